// Package conformance runs containerd's own suite for snapshotters against the daemon, over its socket.
//
// The name given to the suite is that of containerd's overlay snapshotter: what it excuses for that one (renaming a
// directory of a lower layer needs a kernel with redirect_dir) is excused here, and nothing else.
package conformance

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/proxy"
	"github.com/containerd/containerd/v2/core/snapshots/testsuite"
	_ "github.com/containerd/containerd/v2/pkg/testutil" // Declares -test.root.
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

const startSecondsMax = 10

func TestSnapshotter(t *testing.T) {
	binary := os.Getenv("SOCI_SNAPSHOTTER_BINARY")
	if binary == "" {
		t.Fatal("SOCI_SNAPSHOTTER_BINARY must name the daemon")
	}
	if os.Geteuid() != 0 {
		t.Fatal("mounting needs root")
	}
	testsuite.SnapshotterSuite(t, "overlayfs", func(_ context.Context, root string) (snapshots.Snapshotter, func() error, error) {
		return start(binary, root)
	})
}

// start runs a daemon of its own for one subtest and connects to it.
func start(binary, root string) (snapshots.Snapshotter, func() error, error) {
	socket := filepath.Join(root, "run", "grpc.sock")
	daemon := exec.Command(binary, "--root", root, "--address", socket, "--log-level", "warn")
	log, err := daemon.StderrPipe()
	if err != nil {
		return nil, nil, err
	}
	if err := daemon.Start(); err != nil {
		return nil, nil, err
	}
	go func() {
		for lines := bufio.NewScanner(log); lines.Scan(); {
			fmt.Fprintln(os.Stderr, lines.Text())
		}
	}()
	stop := func() error {
		if err := daemon.Process.Signal(os.Interrupt); err != nil {
			return err
		}
		return daemon.Wait()
	}
	if err := await(socket); err != nil {
		return nil, nil, errors.Join(err, stop())
	}
	connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return nil, nil, errors.Join(err, stop())
	}
	snapshotter := proxy.NewSnapshotter(snapshotsapi.NewSnapshotsClient(connection), "soci")
	return snapshotter, func() error { return errors.Join(connection.Close(), stop()) }, nil
}

// await returns when the daemon accepts connections.
func await(socket string) error {
	var err error
	for deadline := time.Now().Add(startSecondsMax * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		var connection net.Conn
		if connection, err = net.Dial("unix", socket); err == nil {
			return connection.Close()
		}
	}
	return fmt.Errorf("the daemon does not listen on %s: %w", socket, err)
}

// Command pull pulls an image into a containerd as Kubernetes and nerdctl do: with a remote snapshotter, and with the
// labels that tell it about the image. ctr does not set these.
package main

import (
	"context"
	"fmt"
	"os"

	containerd "github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/remotes/docker"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "pull:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) != 4 {
		return fmt.Errorf("usage: pull SOCKET SNAPSHOTTER IMAGE")
	}
	client, err := containerd.New(os.Args[1])
	if err != nil {
		return err
	}
	defer client.Close()
	ctx := namespaces.WithNamespace(context.Background(), "default")
	hosts := docker.ConfigureDefaultRegistries(docker.WithPlainHTTP(docker.MatchLocalhost))
	image, err := client.Pull(ctx, os.Args[3],
		containerd.WithPullUnpack,
		containerd.WithPullSnapshotter(os.Args[2]),
		containerd.WithImageHandlerWrapper(snapshotters.AppendInfoHandlerWrapper(os.Args[3])),
		containerd.WithResolver(docker.NewResolver(docker.ResolverOptions{Hosts: hosts})),
	)
	if err != nil {
		return err
	}
	fmt.Println(image.Target().Digest)
	return nil
}

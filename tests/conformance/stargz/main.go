// A peer for measurements: stargz-snapshotter v0.18.1 as a library.
//
//	stargz serve ROOT SOCKET CONFIG       the snapshotter as a daemon, for containerd's proxy plugin
//	stargz convert HOST/REPO:TAG TAG      an eStargz copy of a single-platform image, under another tag of its repository
//
// The configuration is that of the published daemon. It says "successfully started" when it serves.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	golog "log"
	"net"
	"os"
	"os/signal"
	"strconv"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/log"
	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/service"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/pelletier/go-toml"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/registry/remote"
)

func main() {
	arguments := os.Args[1:]
	var err error
	switch {
	case len(arguments) == 4 && arguments[0] == "serve":
		err = serve(arguments[1], arguments[2], arguments[3])
	case len(arguments) == 3 && arguments[0] == "convert":
		err = convert(context.Background(), arguments[1], arguments[2])
	default:
		err = fmt.Errorf("usage: stargz serve ROOT SOCKET CONFIG | stargz convert HOST/REPO:TAG TAG")
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "stargz:", err)
		os.Exit(1)
	}
}

func serve(root, socket, configuration string) error {
	logrus.SetFormatter(&logrus.JSONFormatter{TimestampFormat: log.RFC3339NanoFixed})
	ctx := log.WithLogger(context.Background(), log.L)
	golog.SetOutput(log.G(ctx).WriterLevel(logrus.DebugLevel))
	tree, err := toml.LoadFile(configuration)
	if err != nil {
		return err
	}
	var config service.Config
	if err := tree.Unmarshal(&config); err != nil {
		return err
	}
	snapshotter, err := service.NewStargzSnapshotterService(ctx, root, &config)
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(snapshotter))
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, unix.SIGINT, unix.SIGTERM)
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(listener) }()
	log.G(ctx).Info("successfully started")
	select {
	case <-signals:
		// Unmounts what is mounted.
		return snapshotter.Close()
	case err := <-failed:
		return err
	}
}

func convert(ctx context.Context, name, tag string) error {
	repository, err := remote.NewRepository(name)
	if err != nil {
		return err
	}
	repository.PlainHTTP = true
	target, err := repository.Resolve(ctx, repository.Reference.Reference)
	if err != nil {
		return err
	}
	text, err := content.FetchAll(ctx, repository, target)
	if err != nil {
		return err
	}
	var manifest ocispec.Manifest
	if err := json.Unmarshal(text, &manifest); err != nil {
		return err
	}
	text, err = content.FetchAll(ctx, repository, manifest.Config)
	if err != nil {
		return err
	}
	// Kept as it is, but for what the layers are.
	var config map[string]any
	if err := json.Unmarshal(text, &config); err != nil {
		return err
	}
	var tars []string
	for position, layer := range manifest.Layers {
		converted, tar, err := convertLayer(ctx, repository, layer)
		if err != nil {
			return fmt.Errorf("layer %s: %w", layer.Digest, err)
		}
		manifest.Layers[position] = converted
		tars = append(tars, tar.String())
	}
	config["rootfs"] = map[string]any{"type": "layers", "diff_ids": tars}
	if text, err = json.Marshal(config); err != nil {
		return err
	}
	manifest.Config = content.NewDescriptorFromBytes(ocispec.MediaTypeImageConfig, text)
	if err := push(ctx, repository, manifest.Config, text); err != nil {
		return err
	}
	manifest.MediaType = ocispec.MediaTypeImageManifest
	if text, err = json.Marshal(manifest); err != nil {
		return err
	}
	described := content.NewDescriptorFromBytes(ocispec.MediaTypeImageManifest, text)
	if err := push(ctx, repository, described, text); err != nil {
		return err
	}
	return repository.Tag(ctx, described, tag)
}

func convertLayer(ctx context.Context, repository *remote.Repository, layer ocispec.Descriptor) (ocispec.Descriptor, digest.Digest, error) {
	blob, size, err := download(ctx, repository, layer)
	if err != nil {
		return layer, "", err
	}
	defer remove(blob)
	built, err := estargz.Build(io.NewSectionReader(blob, 0, size), estargz.WithContext(ctx))
	if err != nil {
		return layer, "", err
	}
	defer built.Close()
	file, err := os.CreateTemp("", "estargz-")
	if err != nil {
		return layer, "", err
	}
	defer remove(file)
	digester := digest.Canonical.Digester()
	written, err := io.Copy(io.MultiWriter(file, digester.Hash()), built)
	if err != nil {
		return layer, "", err
	}
	// What was read last decides about the tar's digest.
	if err := built.Close(); err != nil {
		return layer, "", err
	}
	uncompressed, err := built.UncompressedSize()
	if err != nil {
		return layer, "", err
	}
	converted := ocispec.Descriptor{
		MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digester.Digest(), Size: written,
		Annotations: map[string]string{
			estargz.TOCJSONDigestAnnotation:         built.TOCDigest().String(),
			estargz.StoreUncompressedSizeAnnotation: strconv.FormatInt(uncompressed, 10),
		},
	}
	if _, err := file.Seek(0, io.SeekStart); err != nil {
		return layer, "", err
	}
	if exists, err := repository.Exists(ctx, converted); err != nil || exists {
		return converted, built.DiffID(), err
	}
	return converted, built.DiffID(), repository.Push(ctx, converted, file)
}

func download(ctx context.Context, repository *remote.Repository, layer ocispec.Descriptor) (*os.File, int64, error) {
	reader, err := repository.Fetch(ctx, layer)
	if err != nil {
		return nil, 0, err
	}
	defer reader.Close()
	file, err := os.CreateTemp("", "layer-")
	if err != nil {
		return nil, 0, err
	}
	verified := content.NewVerifyReader(reader, layer)
	size, err := io.Copy(file, verified)
	if err == nil {
		err = verified.Verify()
	}
	if err != nil {
		remove(file)
	}
	return file, size, err
}

func remove(file *os.File) {
	file.Close()
	os.Remove(file.Name())
}

func push(ctx context.Context, repository *remote.Repository, described ocispec.Descriptor, text []byte) error {
	exists, err := repository.Exists(ctx, described)
	if err != nil || exists {
		return err
	}
	return repository.Push(ctx, described, bytes.NewReader(text))
}

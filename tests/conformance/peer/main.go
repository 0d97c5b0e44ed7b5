// A peer for tests: AWS's soci-snapshotter v0.16.1 as a library, doing what its tools do with an OCI layout or a
// registry. Our tests compare bytes with it, read what it writes and have it read what we write.
//
//	peer create LAYOUT [flags]            version 1 indexes of all platforms into the layout; prints their digests
//	peer convert LAYOUT [flags]           a SOCI-enabled image in the layout; prints the digest of its image index
//	peer push LAYOUT DIGEST HOST/REPO     an index of the layout, with all it names, into a registry
//	peer pull HOST/REPO DIGEST SIZE DIR   finds the index of an image manifest as the daemon does and fetches it
//	peer files LAYER ZTOC                 every regular file of a layer, read by its zTOC: SHA-256 and name
//	peer again INDEX                      an index manifest, decoded and encoded again as the daemon does
package main

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	socifs "github.com/awslabs/soci-snapshotter/fs"
	"github.com/awslabs/soci-snapshotter/soci"
	"github.com/awslabs/soci-snapshotter/soci/store"
	"github.com/awslabs/soci-snapshotter/ztoc"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/pkg/reference"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2"
	"oras.land/oras-go/v2/content"
	"oras.land/oras-go/v2/content/oci"
	"oras.land/oras-go/v2/registry/remote"
)

// What the tools write as their name.
const tool = "AWS SOCI CLI v0.2"

func main() {
	if len(os.Args) < 3 {
		fail(fmt.Errorf("usage: peer COMMAND ARGUMENTS"))
	}
	commands := map[string]func(context.Context, []string) error{
		"create": create, "convert": convert, "push": push, "pull": pull, "files": files, "again": again,
	}
	command, known := commands[os.Args[1]]
	if !known {
		fail(fmt.Errorf("unknown command %s", os.Args[1]))
	}
	if err := command(context.Background(), os.Args[2:]); err != nil {
		fail(err)
	}
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "peer:", err)
	os.Exit(1)
}

// An image in a layout, ready to be indexed.
type layout struct {
	directory string
	blobs     *store.SociStore
	image     images.Image
	builder   *soci.IndexBuilder
	platforms []ocispec.Platform
}

func open(ctx context.Context, arguments []string) (*layout, func(), error) {
	directory := arguments[0]
	flags := flag.NewFlagSet("peer", flag.ExitOnError)
	span := flags.Int64("span-size", 1<<22, "")
	least := flags.Int64("min-layer-size", 10<<20, "")
	xattr := flags.Bool("xattr", false, "")
	prefetch := flags.String("prefetch", "", "paths, separated by commas")
	if err := flags.Parse(arguments[1:]); err != nil {
		return nil, nil, err
	}
	root, err := rootOf(directory)
	if err != nil {
		return nil, nil, err
	}
	blobs, err := oci.New(directory)
	if err != nil {
		return nil, nil, err
	}
	layers, err := local.NewStore(directory)
	if err != nil {
		return nil, nil, err
	}
	scratch, err := os.MkdirTemp("", "peer-")
	if err != nil {
		return nil, nil, err
	}
	clean := func() { os.RemoveAll(scratch) }
	database, err := soci.NewDB(soci.ArtifactsDbPath(scratch))
	if err != nil {
		return nil, clean, err
	}
	options := []soci.BuilderOption{
		soci.WithSpanSize(*span), soci.WithMinLayerSize(*least), soci.WithBuildToolIdentifier(tool),
		soci.WithArtifactsDb(database),
	}
	if *xattr {
		options = append(options, soci.WithOptimizations([]soci.Optimization{soci.XAttrOptimization}))
	}
	if *prefetch != "" {
		options = append(options, soci.WithPrefetchPaths(strings.Split(*prefetch, ",")))
	}
	ours := &store.SociStore{Store: blobs}
	builder, err := soci.NewIndexBuilder(layers, ours, options...)
	if err != nil {
		return nil, clean, err
	}
	image := images.Image{Name: directory, Target: root}
	platforms, err := images.Platforms(ctx, layers, root)
	return &layout{directory, ours, image, builder, platforms}, clean, err
}

func rootOf(directory string) (ocispec.Descriptor, error) {
	text, err := os.ReadFile(filepath.Join(directory, "index.json"))
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var index ocispec.Index
	if err := json.Unmarshal(text, &index); err != nil {
		return ocispec.Descriptor{}, err
	}
	if len(index.Manifests) != 1 {
		return ocispec.Descriptor{}, fmt.Errorf("%s: %d images in index.json", directory, len(index.Manifests))
	}
	return index.Manifests[0], nil
}

func create(ctx context.Context, arguments []string) error {
	layout, clean, err := open(ctx, arguments)
	if clean != nil {
		defer clean()
	}
	if err != nil {
		return err
	}
	for _, platform := range layout.platforms {
		built, err := layout.builder.Build(ctx, layout.image, soci.WithPlatform(platform))
		if err != nil {
			return err
		}
		fmt.Println(built.Desc.Digest)
	}
	return nil
}

func convert(ctx context.Context, arguments []string) error {
	layout, clean, err := open(ctx, arguments)
	if clean != nil {
		defer clean()
	}
	if err != nil {
		return err
	}
	converted, err := layout.builder.Convert(ctx, layout.image, soci.ConvertWithPlatforms(layout.platforms...))
	if err != nil {
		return err
	}
	fmt.Println(converted.Digest)
	return nil
}

func repository(name string) (*remote.Repository, error) {
	repository, err := remote.NewRepository(name)
	if err != nil {
		return nil, err
	}
	repository.PlainHTTP = true
	return repository, nil
}

func push(ctx context.Context, arguments []string) error {
	source, err := oci.New(arguments[0])
	if err != nil {
		return err
	}
	target, err := repository(arguments[2])
	if err != nil {
		return err
	}
	text, err := os.ReadFile(blob(arguments[0], digest.Digest(arguments[1])))
	if err != nil {
		return err
	}
	index := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.Digest(arguments[1]), Size: int64(len(text))}
	options := oras.DefaultCopyGraphOptions
	// An index and its blobs are pushed, not the image that it refers to.
	options.FindSuccessors = func(ctx context.Context, fetcher content.Fetcher, described ocispec.Descriptor) ([]ocispec.Descriptor, error) {
		successors, err := content.Successors(ctx, fetcher, described)
		if err != nil {
			return nil, err
		}
		var kept []ocispec.Descriptor
		for _, successor := range successors {
			if successor.MediaType != ocispec.MediaTypeImageManifest {
				kept = append(kept, successor)
			}
		}
		return kept, nil
	}
	return oras.CopyGraph(ctx, source, target, index, options)
}

func blob(directory string, digest digest.Digest) string {
	return filepath.Join(directory, "blobs", digest.Algorithm().String(), digest.Encoded())
}

func pull(ctx context.Context, arguments []string) error {
	name, directory := arguments[0], arguments[3]
	remoteStore, err := repository(name)
	if err != nil {
		return err
	}
	var size int64
	if _, err := fmt.Sscan(arguments[2], &size); err != nil {
		return err
	}
	manifest := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.Digest(arguments[1]), Size: size}
	found, err := socifs.NewOCIArtifactClient(remoteStore).SelectReferrer(ctx, manifest, socifs.SelectFirstPolicy)
	if err != nil {
		return err
	}
	spec, err := reference.Parse(name + "@" + arguments[1])
	if err != nil {
		return err
	}
	blobs, err := store.NewSociStore(directory)
	if err != nil {
		return err
	}
	index, err := socifs.FetchSociArtifacts(ctx, spec, found, blobs, plain{remoteStore})
	if err != nil {
		return err
	}
	fmt.Println(found.Digest)
	// What the daemon keeps must be what the registry has: it is stored under the same digest.
	encoded, err := soci.MarshalIndex(index)
	if err != nil {
		return err
	}
	if kept := digest.FromBytes(encoded); kept != found.Digest {
		return fmt.Errorf("the index is %s after encoding it again", kept)
	}
	for _, described := range index.Blobs {
		if described.MediaType != soci.SociLayerMediaType {
			fmt.Println(described.Digest)
			continue
		}
		reader, err := remoteStore.Blobs().Fetch(ctx, described)
		if err != nil {
			return err
		}
		if _, err := ztoc.Unmarshal(reader); err != nil {
			return fmt.Errorf("%s: %w", described.Digest, err)
		}
		reader.Close()
		fmt.Println(described.Digest)
	}
	return nil
}

// The daemon's own store wraps a repository in the same way.
type plain struct{ *remote.Repository }

func (p plain) Resolve(ctx context.Context, name string) (ocispec.Descriptor, error) {
	described, err := p.Repository.Resolve(ctx, name)
	if err == nil {
		return described, nil
	}
	return p.Repository.Blobs().Resolve(ctx, name)
}

func (p plain) DoInitialFetch(context.Context, string) (bool, error) { return true, nil }

func (p plain) Client() *http.Client { return http.DefaultClient }

func files(_ context.Context, arguments []string) error {
	layer, err := os.Open(arguments[0])
	if err != nil {
		return err
	}
	defer layer.Close()
	stat, err := layer.Stat()
	if err != nil {
		return err
	}
	text, err := os.Open(arguments[1])
	if err != nil {
		return err
	}
	defer text.Close()
	toc, err := ztoc.Unmarshal(text)
	if err != nil {
		return err
	}
	reader := io.NewSectionReader(layer, 0, stat.Size())
	for _, entry := range toc.FileMetadata {
		if entry.Type != "reg" {
			continue
		}
		bytes, err := toc.ExtractFile(reader, entry.Name)
		if err != nil {
			return fmt.Errorf("%s: %w", entry.Name, err)
		}
		fmt.Printf("%x %s\n", sha256.Sum256(bytes), entry.Name)
	}
	return nil
}

func again(_ context.Context, arguments []string) error {
	text, err := os.ReadFile(arguments[0])
	if err != nil {
		return err
	}
	var index soci.Index
	if err := soci.UnmarshalIndex(text, &index); err != nil {
		return err
	}
	encoded, err := soci.MarshalIndex(&index)
	if err != nil {
		return err
	}
	_, err = os.Stdout.Write(encoded)
	return err
}

//go:build tools

// Package aws pins the version of AWS's soci-snapshotter, whose daemon is built and measured beside ours.
package aws

import _ "github.com/awslabs/soci-snapshotter/cmd/soci-snapshotter-grpc"

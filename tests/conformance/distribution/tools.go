//go:build tools

// Package distribution pins the version of the registry that tests build and start.
package distribution

import _ "github.com/distribution/distribution/v3/cmd/registry"

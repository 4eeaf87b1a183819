// Package store holds what Redis and Valkey are told at their start, in the cluster and locally alike.
package store

import _ "embed"

// Config is the part of redis.conf that the counts rely on.
//
//go:embed redis.conf
var Config string

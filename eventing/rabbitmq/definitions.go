// Package rabbitmq holds what RabbitMQ is told at its start, in the cluster and locally alike.
package rabbitmq

import _ "embed"

// Definitions declare the queue "message", a durable quorum queue that refuses what it can't hold and delivers again for
// ever, and where its dead letters go: exchange and queue "message.dead". They name no user.
//
//go:embed definitions.json
var Definitions []byte

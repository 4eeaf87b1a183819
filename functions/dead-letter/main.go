// Dead-letter puts what a source of Knative gives up on into a topic: a dead letter sink is an address.
package main

import (
	"context"
	"net"

	"isobar.dev/internal/kafka"
	"isobar.dev/internal/peer"
	"isobar.dev/internal/serve"
)

type settings struct {
	Host  string `env:"HOST"` // the address to listen on; all of them if empty
	Port  string `env:"PORT" envDefault:"8080"`
	Topic string `env:"KAFKA_DEAD_TOPIC" envDefault:"message.dead"`
	Kafka kafka.Settings
}

func main() { serve.Main("dead-letter", build) }

func build(_ context.Context, s settings) (*serve.Program, error) {
	sender, err := kafka.NewSender(s.Kafka, s.Topic, kafka.DeadLetters)
	if err != nil {
		return nil, err
	}
	return &serve.Program{
		Listeners: []serve.Listener{{Addr: net.JoinHostPort(s.Host, s.Port), HTTP: newSink(sender, s.Topic), Headers: maxHeaders}},
		Close:     sender.Close,
		Peers:     func() map[string]string { return map[string]string{"kafka": peer.State(sender.Err())} },
	}, nil
}

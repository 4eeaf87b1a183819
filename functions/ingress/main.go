// Ingress takes weather reports over HTTP and hands them to the publisher over gRPC, those of many requests together.
package main

import (
	"context"
	"net"

	"github.com/cloudevents/sdk-go/v2/event"

	"isobar.dev/events/api"
	"isobar.dev/internal/peer"
	"isobar.dev/internal/serve"
)

type settings struct {
	Host      string   `env:"HOST"` // the address to listen on; all of them if empty
	Port      string   `env:"PORT" envDefault:"8080"`
	Publisher string   `env:"PUBLISHER_ADDR,required,notEmpty"` // HOST:PORT
	TLS       bool     `env:"PUBLISHER_TLS"`
	CAFile    string   `env:"PUBLISHER_CA_FILE"`           // PEM; the system's authorities without it
	GroupSize int      `env:"GROUP_SIZE" envDefault:"500"` // most reports in one call; 1 gives each request its own
	WakeURLs  []string `env:"WAKE_URLS"`                   // asked when a report comes after a quiet time: services that scale to zero
}

func (s settings) secure() peer.TLS {
	return peer.TLS{Peer: "the publisher", Prefix: "PUBLISHER_", On: s.TLS, CAFile: s.CAFile}
}

func main() { serve.Main("ingress", build) }

func build(_ context.Context, s settings) (*serve.Program, error) {
	wake, err := newWaker(s.WakeURLs)
	if err != nil {
		return nil, err
	}
	p, err := newPublisher(s.Publisher, s.secure(), s.GroupSize)
	if err != nil {
		return nil, err
	}
	publish := func(ctx context.Context, reports []event.Event) error {
		wake.report()
		return p.publish(ctx, reports)
	}
	return &serve.Program{
		Listeners: []serve.Listener{{Addr: net.JoinHostPort(s.Host, s.Port), HTTP: api.Handler(publish)}},
		Close:     func() { wake.close(); p.close() },
		Peers:     p.peers,
	}, nil
}

// Valkey-writer counts weather reports in Valkey.
package main

import (
	"context"
	"net"
	"time"

	"isobar.dev/counts"
	"isobar.dev/internal/serve"
)

type settings struct {
	Host         string          `env:"HOST"`
	Port         string          `env:"PORT" envDefault:"8080"`
	Valkey       counts.Settings `envPrefix:"VALKEY_"`
	DedupeWindow time.Duration   `env:"DEDUPE_WINDOW" envDefault:"24h"`
	GroupSize    int             `env:"GROUP_SIZE" envDefault:"1000"`
}

func main() {
	serve.Main("valkey-writer", func(_ context.Context, s settings) (*serve.Program, error) {
		store, err := counts.Open("valkey", s.Valkey, s.DedupeWindow)
		if err != nil {
			return nil, err
		}
		handler, err := counts.NewHandler(store, s.GroupSize)
		if err != nil {
			return nil, err
		}
		return &serve.Program{
			Listeners:  []serve.Listener{{Addr: net.JoinHostPort(s.Host, s.Port), HTTP: handler}},
			Background: store.Watch,
			Peers:      func() map[string]string { return map[string]string{"valkey": store.Status()} },
			Close:      func() { handler.Close(); store.Close() },
		}, nil
	})
}

// Redis-writer counts weather reports in Redis.
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
	Redis        counts.Settings `envPrefix:"REDIS_"`
	DedupeWindow time.Duration   `env:"DEDUPE_WINDOW" envDefault:"24h"`
	GroupSize    int             `env:"GROUP_SIZE" envDefault:"1000"`
}

func main() {
	serve.Main("redis-writer", func(_ context.Context, s settings) (*serve.Program, error) {
		store, err := counts.Open("redis", s.Redis, s.DedupeWindow)
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
			Peers:      func() map[string]string { return map[string]string{"redis": store.Status()} },
			Close:      func() { handler.Close(); store.Close() },
		}, nil
	})
}

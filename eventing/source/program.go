package source

import (
	"context"
	"fmt"
	"net"
	"net/http"

	"isobar.dev/internal/problem"
	"isobar.dev/internal/serve"
)

// Settings are those that every source program has.
type Settings struct {
	SinkSettings
	GroupSize int    `env:"GROUP_SIZE" envDefault:"1000"` // most events in one POST; 1 sends each by itself
	Host      string `env:"HOST"`                         // the address to listen on; all of them if empty
	Port      string `env:"PORT"`                         // for probes; none if empty, as a source takes no requests
}

// Program returns how a source program is built of its settings, for serve.Main.
func Program[S any](build func(S) (Settings, Source, error)) func(context.Context, S) (*serve.Program, error) {
	return func(_ context.Context, s S) (*serve.Program, error) {
		settings, src, err := build(s)
		if err != nil {
			return nil, err
		}
		sink, err := NewSink(settings.SinkSettings)
		if err != nil {
			return nil, err
		}
		if settings.GroupSize < 1 {
			return nil, fmt.Errorf("GROUP_SIZE must be at least 1, not %d", settings.GroupSize)
		}
		program := &serve.Program{
			Background: func(ctx context.Context) { Deliver(ctx, src, sink, settings.GroupSize) },
			Close:      src.Close,
			Peers:      func() map[string]string { return map[string]string{"broker": src.State()} },
		}
		if settings.Port != "" {
			program.Listeners = []serve.Listener{{Addr: net.JoinHostPort(settings.Host, settings.Port), HTTP: http.HandlerFunc(nothing)}}
		}
		return program, nil
	}
}

func nothing(w http.ResponseWriter, r *http.Request) {
	problem.Write(w, problem.Details{Status: http.StatusNotFound, Detail: "a source has /health and /readyz, and not " + r.URL.Path})
}

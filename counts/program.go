package counts

import (
	"net"
	"time"

	"isobar.dev/internal/serve"
)

// ProgramSettings are those that every writer has, beside those of its store.
type ProgramSettings struct {
	Host         string        `env:"HOST"` // the address to listen on; all of them if empty
	Port         string        `env:"PORT" envDefault:"8080"`
	DedupeWindow time.Duration `env:"DEDUPE_WINDOW" envDefault:"24h"`
	GroupSize    int           `env:"GROUP_SIZE" envDefault:"1000"` // most reports in one script call; 1 gives each request its own
}

// Program returns the writer of the store that Open knows by that name.
func Program(name string, s ProgramSettings, of Settings) (*serve.Program, error) {
	store, err := Open(name, of, s.DedupeWindow)
	if err != nil {
		return nil, err
	}
	handler, err := NewHandler(store, s.GroupSize)
	if err != nil {
		return nil, err
	}
	return &serve.Program{
		Listeners:  []serve.Listener{{Addr: net.JoinHostPort(s.Host, s.Port), HTTP: handler}},
		Background: store.Watch,
		Peers:      func() map[string]string { return map[string]string{name: store.Status()} },
		Close:      func() { handler.Close(); store.Close() },
	}, nil
}

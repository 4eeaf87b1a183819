// Package serve is the life of a program: it reads its settings, listens, answers probes, and on SIGTERM drains, so
// that no request is lost that it had begun to read.
package serve

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"reflect"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/caarlos0/env/v11"
	"google.golang.org/grpc"
	"knative.dev/pkg/network/handlers"
	"knative.dev/pkg/signals"

	"isobar.dev/internal/problem"
)

const (
	// quiet is how long no request must have come before an idle connection is closed: a client that holds one must
	// have had the time to use it once more and to be told that it closes.
	quiet = 250 * time.Millisecond
	// patience bounds the draining. Knative and Kubernetes send SIGKILL after 30 s by default.
	patience = 20 * time.Second

	// What lives in one of the programs is small and soon garbage: collecting it less often, as long as there is memory,
	// saves a third of their CPU. GOGC and GOMEMLIMIT say otherwise.
	garbage = 400
	memory  = 40 << 20

	// share is how many programs and servers a program shares the processors with, about. A processor more than it needs
	// costs it dear: threads that look for work. On two processors one for each saves a quarter of all CPU. GOMAXPROCS
	// says otherwise.
	share = 4
)

// Program is what a main hands over.
type Program struct {
	// Listeners are served until the program is told to stop.
	Listeners []Listener
	// Background runs beside them; its context ends when the listeners have drained. It returns when it is done.
	Background func(context.Context)
	// Close frees what the program holds, last of all. It must return by itself.
	Close func()
	// Peers tells how each of the peers does. It is for a person who reads /readyz: readiness does not depend on it,
	// since a caller is better told 503 than kept waiting. It must not wait.
	Peers func() map[string]string
}

// Listener is one port. A Listener with both an HTTP handler and a gRPC server serves both on it, with HTTP/1.1 and
// unencrypted HTTP/2 (h2c), as Knative's one port asks.
type Listener struct {
	Addr    string // HOST:PORT
	HTTP    http.Handler
	GRPC    *grpc.Server
	Headers int // most bytes of a request's headers, answered 431 beyond; 64 KiB if 0
}

// Main runs a program: S is the struct of its settings, with env's tags. It does not return before the program has
// been told to stop by SIGTERM or SIGINT and has drained, or has failed; then it ends the process.
func Main[S any](name string, build func(context.Context, S) (*Program, error)) {
	slog.SetDefault(logger(os.Stderr).With("program", name))
	if os.Getenv("GOGC") == "" && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetGCPercent(garbage)
		debug.SetMemoryLimit(memory)
	}
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(1, runtime.GOMAXPROCS(0)/share))
	}
	if err := run(name, build); err != nil {
		slog.Error("stopped", "error", err)
		os.Exit(1)
	}
}

func run[S any](name string, build func(context.Context, S) (*Program, error)) error {
	settings, err := env.ParseAs[S]()
	if err != nil {
		if wrong, ok := errors.AsType[env.ParseError](err); ok {
			err = fmt.Errorf("%s: %w", variable(reflect.TypeFor[S](), wrong), wrong.Err)
		}
		return fmt.Errorf("settings of %s: %w", name, err)
	}
	ctx := signals.NewContext()
	program, err := build(ctx, settings)
	if err != nil {
		return err
	}
	return program.Run(ctx)
}

// variable is the environment variable of a field of the settings; env's errors name the field only. Where several have
// that name, it is the one whose value the error quotes.
func variable(settings reflect.Type, wrong env.ParseError) string {
	var name string
	for _, v := range variables(settings, wrong.Name) {
		if value := os.Getenv(v); name == "" || value != "" && strings.Contains(wrong.Err.Error(), strconv.Quote(value)) {
			name = v
		}
	}
	return name
}

func variables(settings reflect.Type, field string) []string {
	var names []string
	for f := range settings.Fields() {
		switch {
		case f.Name == field:
			name, _, _ := strings.Cut(f.Tag.Get("env"), ",")
			names = append(names, name)
		case f.Type.Kind() == reflect.Struct:
			for _, inner := range variables(f.Type, field) {
				names = append(names, f.Tag.Get("envPrefix")+inner)
			}
		}
	}
	return names
}

// logger writes JSON in a cluster and readable text elsewhere.
func logger(w io.Writer) *slog.Logger {
	if os.Getenv("KUBERNETES_SERVICE_HOST") != "" {
		return slog.New(slog.NewJSONHandler(w, nil))
	}
	return slog.New(slog.NewTextHandler(w, nil))
}

// Run serves until ctx ends, then drains.
func (p *Program) Run(ctx context.Context) error {
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	var running sync.WaitGroup
	defer func() {
		stop()
		running.Wait()
		if p.Close != nil {
			p.Close()
		}
	}()

	servers := make([]*server, 0, len(p.Listeners))
	failed := make(chan error, len(p.Listeners))
	for _, l := range p.Listeners {
		s, err := p.listen(l)
		if err != nil {
			for _, s := range servers {
				s.listener.Close()
			}
			return err
		}
		servers = append(servers, s)
	}
	for _, s := range servers {
		running.Go(func() {
			if err := s.serve(); err != nil && !errors.Is(err, http.ErrServerClosed) && !s.draining.Load() {
				failed <- fmt.Errorf("serve %s: %w", s.listener.Addr(), err)
			}
		})
	}
	if p.Background != nil {
		running.Go(func() { p.Background(background) })
	}
	for _, s := range servers {
		slog.Info("ready", "address", s.listener.Addr().String())
	}

	var err error
	select {
	case <-ctx.Done():
		slog.Info("draining")
	case err = <-failed:
	}
	patient, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	var drained sync.WaitGroup
	for _, s := range servers {
		drained.Go(func() { s.drain(patient) })
	}
	drained.Wait()
	return err
}

// server serves one Listener.
type server struct {
	listener net.Listener
	grpc     *grpc.Server // if it has the port for itself
	http     *http.Server
	drainer  *handlers.Drainer
	draining atomic.Bool
}

func (p *Program) listen(l Listener) (*server, error) {
	listener, err := net.Listen("tcp", l.Addr)
	if err != nil {
		if errors.Is(err, syscall.EADDRINUSE) {
			return nil, fmt.Errorf("listen on %s: the port is taken by another program", l.Addr)
		}
		return nil, fmt.Errorf("listen on %s: %w", l.Addr, err)
	}
	s := &server{listener: listener}
	if l.HTTP == nil {
		s.grpc = l.GRPC
		return s, nil
	}
	s.drainer = &handlers.Drainer{Inner: p.probes(s, l.HTTP), QuietPeriod: quiet}
	var handler http.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if s.draining.Load() {
			w.Header().Set("Connection", "close")
		}
		s.drainer.ServeHTTP(w, r)
	})
	if l.GRPC != nil {
		handler = either(l.GRPC, handler)
	}
	protocols := new(http.Protocols)
	protocols.SetHTTP1(true)
	protocols.SetUnencryptedHTTP2(true)
	s.http = &http.Server{
		Handler:           handler,
		Protocols:         protocols,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       60 * time.Second,
		IdleTimeout:       120 * time.Second,
		MaxHeaderBytes:    cmp.Or(l.Headers, 64<<10),
		ErrorLog:          slog.NewLogLogger(slog.Default().Handler(), slog.LevelDebug),
	}
	return s, nil
}

// either sends gRPC's requests to one and all others to the other.
func either(g *grpc.Server, other http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ProtoMajor == 2 && strings.HasPrefix(r.Header.Get("Content-Type"), "application/grpc") {
			g.ServeHTTP(w, r)
			return
		}
		other.ServeHTTP(w, r)
	})
}

func (s *server) serve() error {
	if s.http != nil {
		return s.http.Serve(s.listener)
	}
	return s.grpc.Serve(s.listener)
}

// drain takes no new connection, lets each one that is open answer once more and say that it closes, and waits for the
// requests under way.
func (s *server) drain(ctx context.Context) {
	s.draining.Store(true)
	if s.http == nil {
		done := make(chan struct{})
		go func() { s.grpc.GracefulStop(); close(done) }()
		select {
		case <-done:
		case <-ctx.Done():
			s.grpc.Stop()
			<-done
		}
		return
	}
	s.listener.Close()
	s.drainer.Drain()
	if err := s.http.Shutdown(ctx); err != nil {
		slog.Warn("requests were still under way", "error", err)
		_ = s.http.Close()
	}
}

// probes answers /health and /readyz, which every program has.
func (p *Program) probes(s *server, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/health" && r.URL.Path != "/readyz" {
			next.ServeHTTP(w, r)
			return
		}
		if !Allow(w, r, http.MethodGet, http.MethodHead) {
			return
		}
		status := struct {
			Status string            `json:"status"`
			Peers  map[string]string `json:"peers,omitempty"`
		}{Status: "ok"}
		w.Header().Set("Content-Type", "application/json")
		if r.URL.Path == "/readyz" {
			if p.Peers != nil {
				status.Peers = p.Peers()
			}
			if s.draining.Load() {
				status.Status = "draining"
				w.WriteHeader(http.StatusServiceUnavailable)
			}
		}
		_ = json.NewEncoder(w).Encode(status)
	})
}

// Allow reports whether the request's method is one of those given; if not, it has answered 405.
func Allow(w http.ResponseWriter, r *http.Request, methods ...string) bool {
	for _, method := range methods {
		if r.Method == method {
			return true
		}
	}
	allowed := strings.Join(methods, ", ")
	w.Header().Set("Allow", allowed)
	problem.Write(w, problem.Details{
		Status: http.StatusMethodNotAllowed,
		Detail: fmt.Sprintf("%s takes %s, not %s", r.URL.Path, allowed, r.Method),
	})
	return false
}

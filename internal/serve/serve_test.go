package serve

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	health "google.golang.org/grpc/health/grpc_health_v1"
)

func TestMain(m *testing.M) {
	if os.Getenv("SERVE_TEST") != "" { // the test has started itself as a program
		Main("tested", func(context.Context, testSettings) (*Program, error) { return program() })
		return
	}
	os.Exit(m.Run())
}

type testSettings struct {
	Needed string `env:"SERVE_NEEDED,required,notEmpty"`
	Number int    `env:"SERVE_NUMBER" envDefault:"1"`
	Other  struct{ Name string }
	Inner  struct {
		Wait time.Duration `env:"SERVE_INNER" envDefault:"1s"`
	}
	Same struct {
		Wait time.Duration `env:"SAME" envDefault:"1s"`
	} `envPrefix:"SERVE_"`
}

func program() (*Program, error) {
	return &Program{Listeners: []Listener{{Addr: os.Getenv("SERVE_TEST"), HTTP: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		time.Sleep(2 * quiet)
		_, _ = w.Write(body)
	})}}}, nil
}

func free(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// running is a program under way.
type running struct {
	stop  context.CancelFunc
	ended chan error
}

// run starts a program and waits until it listens.
func start(t *testing.T, p *Program) *running {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	r := &running{stop, make(chan error, 1)}
	go func() { r.ended <- p.Run(ctx) }()
	for _, l := range p.Listeners {
		await(t, l.Addr)
	}
	t.Cleanup(stop)
	return r
}

func await(t *testing.T, addr string) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func (r *running) drained(t *testing.T) {
	t.Helper()
	r.stop()
	select {
	case err := <-r.ended:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience + 10*time.Second):
		t.Fatal("it does not end")
	}
}

// slowly is work whose beginning and end are known by id.
type slowly struct {
	begun    sync.Map
	answered sync.Map
	count    atomic.Int64
}

func (s *slowly) work(id string) {
	if _, twice := s.begun.LoadOrStore(id, true); twice {
		panic("request " + id + " came twice")
	}
	s.count.Add(1)
	time.Sleep(time.Duration(len(id)+int(id[0])%20) * time.Millisecond)
}

func (s *slowly) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	id, err := io.ReadAll(r.Body)
	if err != nil {
		return
	}
	s.work(string(id))
	_, _ = w.Write(bytes.Repeat(id, 100))
}

// client sends one request; reused tells of an error whether it came over a connection that had answered before.
type client func(id string) (answer []byte, reused bool, err error)

func overHTTP(addr string, protocols func(*http.Protocols)) func() client {
	return func() client {
		transport := &http.Transport{Protocols: new(http.Protocols)}
		protocols(transport.Protocols)
		return func(id string) ([]byte, bool, error) {
			var reused bool
			trace := httptrace.WithClientTrace(context.Background(), &httptrace.ClientTrace{
				GotConn: func(info httptrace.GotConnInfo) { reused = info.Reused },
			})
			request, err := http.NewRequestWithContext(trace, http.MethodPost, "http://"+addr+"/", strings.NewReader(id))
			if err != nil {
				return nil, false, err
			}
			if transport.Protocols.HTTP1() {
				request.GetBody = nil // or the transport would send it again by itself
			} // in HTTP/2 it does so only for what the server says that it has not begun
			response, err := transport.RoundTrip(request)
			if err != nil {
				return nil, reused, err
			}
			defer response.Body.Close()
			answer, err := io.ReadAll(response.Body)
			return answer, reused, err
		}
	}
}

type slowHealth struct {
	health.UnimplementedHealthServer
	*slowly
}

func (s slowHealth) Check(_ context.Context, r *health.HealthCheckRequest) (*health.HealthCheckResponse, error) {
	s.work(r.Service)
	return &health.HealthCheckResponse{Status: health.HealthCheckResponse_SERVING}, nil
}

func overGRPC(t *testing.T, addr string) func() client {
	return func() client {
		conn, err := grpc.NewClient("passthrough:"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		return func(id string) ([]byte, bool, error) {
			_, err := health.NewHealthClient(conn).Check(context.Background(), &health.HealthCheckRequest{Service: id})
			return bytes.Repeat([]byte(id), 100), false, err
		}
	}
}

// TestDrain: told to stop under load, a program answers every request that it has begun to read. A client whose
// connection has answered is told that it closes; others find that nobody listens.
func TestDrain(t *testing.T) {
	for _, c := range []struct {
		name   string
		listen func(*Listener, *slowly)
		client func(t *testing.T, addr string) func() client
	}{
		{"HTTP/1.1", func(l *Listener, s *slowly) { l.HTTP = s }, func(_ *testing.T, addr string) func() client {
			return overHTTP(addr, func(p *http.Protocols) { p.SetHTTP1(true) })
		}},
		{"HTTP/2", func(l *Listener, s *slowly) { l.HTTP = s }, func(_ *testing.T, addr string) func() client {
			return overHTTP(addr, func(p *http.Protocols) { p.SetUnencryptedHTTP2(true) })
		}},
		{"gRPC on its own port", func(l *Listener, s *slowly) {
			l.GRPC = grpc.NewServer()
			health.RegisterHealthServer(l.GRPC, slowHealth{slowly: s})
		}, overGRPC},
		{"gRPC on the port of HTTP", func(l *Listener, s *slowly) {
			l.HTTP, l.GRPC = http.NotFoundHandler(), grpc.NewServer()
			health.RegisterHealthServer(l.GRPC, slowHealth{slowly: s})
		}, overGRPC},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, l := new(slowly), Listener{Addr: free(t)}
			c.listen(&l, s)
			r := start(t, &Program{Listeners: []Listener{l}})
			dial := c.client(t, l.Addr)
			var clients sync.WaitGroup
			for range 50 {
				send := dial()
				clients.Go(func() {
					for {
						id := rand.Text()
						answer, reused, err := send(id)
						if err == nil {
							if string(answer) != strings.Repeat(id, 100) {
								t.Errorf("the answer is cut: %d bytes", len(answer))
							}
							s.answered.Store(id, true)
							continue
						}
						if _, begun := s.begun.Load(id); begun {
							t.Errorf("a request that was begun is lost: %v", err)
						}
						if reused && !strings.Contains(err.Error(), "GOAWAY") {
							t.Errorf("a request is lost on a connection that was open: %v", err)
						}
						return
					}
				})
			}
			for s.count.Load() < 500 {
				time.Sleep(time.Millisecond)
			}
			r.drained(t)
			clients.Wait()
			s.begun.Range(func(id, _ any) bool {
				if _, ok := s.answered.Load(id); !ok {
					t.Errorf("request %s was begun and not answered", id)
				}
				return true
			})
		})
	}
}

// beginBody sends the head of a request, and returns once its handler waits for the body.
func beginBody(t *testing.T, addr string, length int) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	fmt.Fprintf(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n", length)
	head := make([]byte, len("HTTP/1.1 100"))
	if _, err := io.ReadFull(conn, head); err != nil || string(head) != "HTTP/1.1 100" {
		t.Fatal(err, string(head))
	}
	return conn
}

// TestDrainWaitsForASlowBody: a request whose body is still on its way was begun, too.
func TestDrainWaitsForASlowBody(t *testing.T) {
	s, l := new(slowly), Listener{Addr: free(t)}
	l.HTTP = s
	r := start(t, &Program{Listeners: []Listener{l}})
	conn := beginBody(t, l.Addr, 4)
	r.stop()
	time.Sleep(2 * quiet)
	fmt.Fprint(conn, "abcd")
	answer, _ := io.ReadAll(conn)
	if !strings.Contains(string(answer), strings.Repeat("abcd", 100)) {
		t.Errorf("answered %q", answer)
	}
	r.drained(t)
}

// answer is a response whose body is read.
type answer struct {
	StatusCode int
	Header     http.Header
	Close      bool
}

func get(t *testing.T, c *http.Client, method, url string) (answer, map[string]any) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	response, err := c.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	var body map[string]any
	if method != http.MethodHead {
		if err := json.NewDecoder(response.Body).Decode(&body); err != nil {
			t.Fatal(err)
		}
	}
	return answer{response.StatusCode, response.Header, response.Close}, body
}

func TestProbes(t *testing.T) {
	work, l := make(chan struct{}), Listener{Addr: free(t)}
	l.HTTP = http.HandlerFunc(func(http.ResponseWriter, *http.Request) { <-work })
	p := &Program{Listeners: []Listener{l}, Peers: func() map[string]string { return map[string]string{"kafka": "away"} }}
	r := start(t, p)
	url := "http://" + l.Addr
	// Each client holds a connection from before the draining.
	var before []*http.Client
	for range 3 {
		c := &http.Client{Transport: &http.Transport{}}
		if response, body := get(t, c, "GET", url+"/health"); response.StatusCode != 200 || body["status"] != "ok" || body["peers"] != nil {
			t.Errorf("/health: %d %v", response.StatusCode, body)
		}
		before = append(before, c)
	}
	response, body := get(t, http.DefaultClient, "GET", url+"/readyz")
	if peers, _ := body["peers"].(map[string]any); response.StatusCode != 200 || body["status"] != "ok" || peers["kafka"] != "away" {
		t.Errorf("/readyz with a peer away: %d %v", response.StatusCode, body)
	}
	if response, _ := get(t, http.DefaultClient, "HEAD", url+"/readyz"); response.StatusCode != 200 {
		t.Errorf("HEAD /readyz: %d", response.StatusCode)
	}
	for _, path := range []string{"/health", "/readyz"} {
		response, body := get(t, http.DefaultClient, "POST", url+path)
		if response.StatusCode != 405 || response.Header.Get("Allow") != "GET, HEAD" || body["status"] != 405.0 {
			t.Errorf("POST %s: %d, Allow %q, %v", path, response.StatusCode, response.Header.Get("Allow"), body)
		}
	}

	http.DefaultClient.CloseIdleConnections()
	busy := make(chan error, 1)
	go func() {
		response, err := before[0].Get(url + "/work")
		if err == nil {
			response.Body.Close()
		}
		busy <- err
	}()
	r.stop()
	for { // nobody listens any more: it drains
		conn, err := net.Dial("tcp", l.Addr)
		if err != nil {
			break
		}
		conn.Close()
	}
	if response, body := get(t, before[1], "GET", url+"/readyz"); response.StatusCode != 503 || body["status"] != "draining" || !response.Close {
		t.Errorf("/readyz while draining: %d %v, close %v", response.StatusCode, body, response.Close)
	}
	if response, body := get(t, before[2], "GET", url+"/health"); response.StatusCode != 200 || body["status"] != "ok" {
		t.Errorf("/health while draining: %d %v", response.StatusCode, body)
	}
	close(work)
	if err := <-busy; err != nil {
		t.Errorf("the request under way: %v", err)
	}
	r.drained(t)
}

// TestOrder: the background works until the last request is answered, and Close comes when nothing runs any more.
func TestOrder(t *testing.T) {
	var mu sync.Mutex
	var order []string
	note := func(s string) {
		mu.Lock()
		defer mu.Unlock()
		order = append(order, s)
	}
	begun := make(chan struct{})
	one, two := Listener{Addr: free(t)}, Listener{Addr: free(t)}
	one.HTTP = http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		close(begun)
		time.Sleep(2 * quiet)
		note("answered")
	})
	two.GRPC = grpc.NewServer()
	r := start(t, &Program{
		Listeners: []Listener{one, two},
		Background: func(ctx context.Context) {
			<-ctx.Done()
			note("told to stop")
			time.Sleep(10 * time.Millisecond)
			note("background ended")
		},
		Close: func() { note("closed") },
	})
	go func() {
		response, err := http.Post("http://"+one.Addr, "", nil)
		if err != nil {
			t.Error(err)
			return
		}
		response.Body.Close()
	}()
	<-begun
	r.drained(t)
	if got := strings.Join(order, ", "); got != "answered, told to stop, background ended, closed" {
		t.Errorf("the order is: %s", got)
	}
}

func TestPortTaken(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	first, closed := free(t), false
	p := &Program{
		Listeners: []Listener{{Addr: first, HTTP: http.NotFoundHandler()}, {Addr: taken.Addr().String(), GRPC: grpc.NewServer()}},
		Close:     func() { closed = true },
	}
	if err := p.Run(t.Context()); err == nil || !strings.Contains(err.Error(), taken.Addr().String()) || !strings.Contains(err.Error(), "taken") {
		t.Errorf("the error is %v", err)
	}
	if !closed {
		t.Error("what the program holds is not closed")
	}
	if l, err := net.Listen("tcp", first); err != nil {
		t.Errorf("the other port is still held: %v", err)
	} else {
		l.Close()
	}
	if err := (&Program{Listeners: []Listener{{Addr: "127.0.0.1:x"}}}).Run(t.Context()); err == nil || !strings.Contains(err.Error(), "127.0.0.1:x") {
		t.Errorf("of an address that is none: %v", err)
	}
}

// TestListenerFails: when one port fails, the program drains and says why.
func TestListenerFails(t *testing.T) {
	p := &Program{Listeners: []Listener{{Addr: free(t), GRPC: grpc.NewServer()}, {Addr: free(t), HTTP: http.NotFoundHandler()}}}
	r := start(t, p)
	p.Listeners[0].GRPC.Stop() // Serve returns without an error: that is no failure
	r.drained(t)
}

func TestSettings(t *testing.T) {
	build := func(context.Context, testSettings) (*Program, error) { panic("built without settings") }
	for _, c := range []struct{ name, needed, number, says string }{
		{"a missing one is named", "", "1", "SERVE_NEEDED"},
		{"a wrong one in a struct is named", "x", "1", "SERVE_INNER"},
		{"of several fields of a name, the wrong one is named", "x", "1", "SERVE_SAME"},
		{"a wrong one is named", "x", "many", "SERVE_NUMBER"},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.needed != "" {
				t.Setenv("SERVE_NEEDED", c.needed)
			}
			t.Setenv("SERVE_NUMBER", c.number)
			if c.says == "SERVE_INNER" || c.says == "SERVE_SAME" {
				t.Setenv(c.says, "soon")
			}
			if err := run("tested", build); err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "settings of tested") {
				t.Errorf("the error is %v", err)
			}
		})
	}
}

// TestMainProgram is the whole life of a process, with a real SIGTERM.
func TestMainProgram(t *testing.T) {
	addr := free(t)
	var log bytes.Buffer
	launch := func(env ...string) *exec.Cmd {
		c := exec.CommandContext(t.Context(), os.Args[0])
		log.Reset()
		c.Env, c.Stderr = append(append(os.Environ(), "SERVE_TEST="+addr), env...), &log
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		return c
	}
	t.Run("SIGTERM: the request under way is answered, and the process ends well", func(t *testing.T) {
		begin := time.Now()
		c := launch("SERVE_NEEDED=x")
		await(t, addr)
		t.Logf("started in %v", time.Since(begin).Round(time.Millisecond))
		conn := beginBody(t, addr, 5)
		if err := c.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		for { // nobody listens any more
			conn, err := net.Dial("tcp", addr)
			if err != nil {
				break
			}
			conn.Close()
			time.Sleep(time.Millisecond)
		}
		fmt.Fprint(conn, "hello")
		if answer, _ := io.ReadAll(conn); !strings.HasSuffix(string(answer), "hello") {
			t.Errorf("answered %q", answer)
		}
		if err := c.Wait(); err != nil || !strings.Contains(log.String(), "draining") {
			t.Errorf("ended with %v\n%s", err, &log)
		}
	})
	t.Run("a missing setting: the process ends and says which", func(t *testing.T) {
		var exit *exec.ExitError
		if err := launch().Wait(); !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(log.String(), "SERVE_NEEDED") {
			t.Errorf("ended with %v\n%s", err, &log)
		}
	})
}

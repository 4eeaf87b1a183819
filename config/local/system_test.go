package local

import (
	"bytes"
	"context"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// elsewhere are servers that need not be there for stand-ins to run.
func elsewhere() map[Kind]string {
	return map[Kind]string{
		KafkaKind: "kafka.test:1", RabbitMQKind: "rabbit.test:2", RedisKind: "redis.test:3", ValkeyKind: "valkey.test:4",
	}
}

// told collects progress.
type told struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (p *told) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.b.Write(b)
}

func (p *told) String() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.b.String()
}

func newSystem(t *testing.T, options Options) *System {
	t.Helper()
	if options.Bin == "" {
		options.Bin = fakes(t)
	}
	t.Setenv("GORACE", "atexit_sleep_ms=0") // the stand-ins need not wait for a last race
	s, err := NewSystem(t.TempDir(), options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Kill(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestWhatEachProgramIsTold(t *testing.T) {
	s := newSystem(t, Options{Servers: elsewhere(), Env: map[string][]string{"": {"ALL=1"}, Ingress: {"ONE=1"}}})
	t.Setenv("PORT", "1")
	if err := s.Start(t.Context(), t.Output()); err != nil {
		t.Fatal(err)
	}
	port := func(variable, name string) string {
		_, p, _ := net.SplitHostPort(s.Addr(name))
		return variable + "=" + p
	}
	for name, want := range map[string][]string{
		Ingress: {port("PORT", Ingress), "PUBLISHER_ADDR=" + s.Addr(PublisherGRPC), "ONE=1"},
		Publisher: {
			port("REST_PORT", Publisher), port("GRPC_PORT", PublisherGRPC), "KAFKA_BOOTSTRAP_SERVERS=kafka.test:1",
			"RABBITMQ_ADDR=rabbit.test:2", "RABBITMQ_USERNAME=guest", "RABBITMQ_PASSWORD=guest",
		},
		KafkaSource: {
			port("PORT", KafkaSource), "K_SINK=http://" + s.Addr(RedisWriter) + "/",
			"KAFKA_BOOTSTRAP_SERVERS=kafka.test:1", "KAFKA_GROUP_INSTANCE_ID=local",
		},
		RabbitMQSource: {
			port("PORT", RabbitMQSource), "K_SINK=http://" + s.Addr(ValkeyWriter) + "/",
			"RABBITMQ_ADDR=rabbit.test:2", "RABBITMQ_USERNAME=guest", "RABBITMQ_PASSWORD=guest",
		},
		RedisWriter:  {port("PORT", RedisWriter), "REDIS_ADDR=redis.test:3"},
		ValkeyWriter: {port("PORT", ValkeyWriter), "VALKEY_ADDR=valkey.test:4"},
	} {
		log, err := os.ReadFile(s.Process(name).Log())
		if err != nil {
			t.Fatal(err)
		}
		got := "\n" + string(log)
		for _, w := range append(want, "HOST=127.0.0.1", "ALL=1") {
			if !strings.Contains(got, "\n"+w+"\n") {
				t.Errorf("%s is not told %s", name, w)
			}
		}
		if name == Publisher && strings.Contains(got, "\nPORT=") {
			t.Error("the publisher is told a PORT")
		}
	}
}

func TestSystem(t *testing.T) {
	t.Run("stops in the order of the road and leaves nothing", func(t *testing.T) {
		s, progress := newSystem(t, Options{Servers: elsewhere()}), &told{}
		if err := s.Start(t.Context(), progress); err != nil {
			t.Fatal(err)
		}
		if err := s.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		var order []string
		for line := range strings.Lines(progress.String()) {
			if name, _, stopped := strings.Cut(line, " stopped after"); stopped {
				order = append(order, strings.TrimSpace(name))
			}
		}
		want := []string{Ingress, Publisher, RabbitMQSource, KafkaSource, ValkeyWriter, RedisWriter}
		if strings.Join(order, " ") != strings.Join(want, " ") {
			t.Errorf("stopped %v, want %v", order, want)
		}
		for _, p := range s.Processes() {
			if p.Pid() != 0 {
				t.Errorf("%s runs", p.Name())
			}
		}
	})
	t.Run("starts again what died, and says so", func(t *testing.T) {
		s, progress := newSystem(t, Options{Servers: elsewhere(), Restart: true}), &told{}
		if err := s.Start(t.Context(), progress); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			pid := s.Process(Publisher).Pid()
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			await(t, "it runs again", func() bool { p := s.Process(Publisher).Pid(); return p != 0 && p != pid })
			await(t, "it is ready", func() bool { return getReady(t.Context(), s.Addr(Publisher)) == nil })
		}
		if !strings.Contains(progress.String(), "publisher died (signal: killed), it is started again") {
			t.Errorf("it says %s", progress)
		}
		if err := s.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("leaves down what was killed on purpose", func(t *testing.T) {
		s, progress := newSystem(t, Options{Servers: elsewhere(), Restart: true}), &told{}
		if err := s.Start(t.Context(), progress); err != nil {
			t.Fatal(err)
		}
		if err := s.Process(Ingress).Kill(); err != nil {
			t.Fatal(err)
		}
		if err := s.Process(Ingress).Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := s.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(progress.String(), "died") {
			t.Errorf("it says %s", progress)
		}
	})
	t.Run("a taken port stops it before anything is started", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		taken := l.Addr().(*net.TCPAddr).Port
		s := newSystem(t, Options{Servers: elsewhere(), Ports: map[string]int{PublisherGRPC: taken, RedisWriter: taken}})
		progress := &told{}
		err = s.Start(t.Context(), progress)
		if err == nil || !strings.Contains(err.Error(), "PUBLISHER_GRPC_PORT sets another") ||
			!strings.Contains(err.Error(), "REDIS_WRITER_PORT sets another") || progress.String() != "" {
			t.Errorf("error %v after %q", err, progress)
		}
	})
	t.Run("another system in the same directory stops it before anything is started", func(t *testing.T) {
		first := newSystem(t, Options{Servers: elsewhere()})
		if err := first.Start(t.Context(), t.Output()); err != nil {
			t.Fatal(err)
		}
		second, err := NewSystem(first.dir, Options{Servers: elsewhere(), Bin: first.options.Bin})
		if err != nil {
			t.Fatal(err)
		}
		if err := second.Start(t.Context(), t.Output()); err == nil || !strings.Contains(err.Error(), "in use") {
			t.Errorf("error %v", err)
		}
		if err := first.Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := second.Start(t.Context(), t.Output()); err != nil {
			t.Error(err)
		}
		if err := second.Kill(); err != nil {
			t.Error(err)
		}
	})
	t.Run("a program that can't start stops it, and nothing is left", func(t *testing.T) {
		s := newSystem(t, Options{Servers: elsewhere(), Env: map[string][]string{Publisher: {"FAKE=dies"}}, Restart: true})
		err := s.Start(t.Context(), t.Output())
		if err == nil || !strings.Contains(err.Error(), "of a bad setting") {
			t.Errorf("error %v", err)
		}
		for _, p := range s.Processes() {
			if p.Pid() != 0 {
				t.Errorf("%s runs", p.Name())
			}
		}
	})
	t.Run("a start that is broken off leaves nothing", func(t *testing.T) {
		s := newSystem(t, Options{Servers: elsewhere()})
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := s.Start(ctx, t.Output()); err == nil {
			t.Error("no error")
		}
		for _, p := range s.Processes() {
			if p.Pid() != 0 {
				t.Errorf("%s runs", p.Name())
			}
		}
	})
}

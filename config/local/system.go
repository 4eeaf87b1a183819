package local

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// The names of what a [System] consists of, beside the four servers, which are named by their [Kind]. They are the names
// of processes, of logs and of ports.
const (
	Ingress        = "ingress"
	Publisher      = "publisher" // of its two ports: REST
	PublisherGRPC  = "publisher-grpc"
	KafkaSource    = "kafka-source"
	RabbitMQSource = "rabbitmq-source"
	RedisWriter    = "redis-writer"
	ValkeyWriter   = "valkey-writer"
)

// DefaultPorts are the ports that `make run` uses.
var DefaultPorts = map[string]int{
	Ingress: 8080, Publisher: 8081, PublisherGRPC: 50051,
	KafkaSource: 8082, RabbitMQSource: 8083, RedisWriter: 8084, ValkeyWriter: 8085,
	string(KafkaKind): 9092, string(RabbitMQKind): 5672, string(RedisKind): 6379, string(ValkeyKind): 6380,
}

// PortVariable is the name of the environment variable by which `make run` is told another port.
func PortVariable(name string) string {
	return strings.ToUpper(strings.ReplaceAll(name, "-", "_")) + "_PORT"
}

// Options change what a [System] is made of. The zero value is a whole system of its own on free ports.
type Options struct {
	// Servers are used instead of ones of its own: host:port by kind.
	Servers map[Kind]string
	// Ports are fixed; those left out are free ones.
	Ports map[string]int
	// Env is added to the environment of the programs, by name, and to that of all of them under "".
	Env map[string][]string
	// ServerOptions go to the servers.
	ServerOptions map[Kind][]Option
	// Bin holds the programs, built already. Without it they are built.
	Bin string
	// Race builds them with the race detector.
	Race bool
	// Restart starts again, after a moment, what ends without having been asked to. What Kill or Stop ended stays down.
	Restart bool
}

// System is all of Isobar on this machine: the servers and our programs, each a [Process].
type System struct {
	dir     string
	options Options
	ports   map[string]int
	all     []*Process // in the order in which they are started
	servers int        // how many of them are servers

	progress io.Writer
	lock     *os.File // held while it runs

	mu           sync.Mutex
	reviving     context.Context // ends when nothing shall be started again
	stopReviving context.CancelFunc
	revivals     sync.WaitGroup
}

// program is one of ours.
type program struct {
	name, folder string
	env          func(s *System) []string
}

// programs are in the order in which they are started: nobody before whom he calls.
var programs = []program{
	{RedisWriter, "functions", func(s *System) []string {
		return []string{s.port("PORT", RedisWriter), "REDIS_ADDR=" + s.Addr(string(RedisKind))}
	}},
	{ValkeyWriter, "functions", func(s *System) []string {
		return []string{s.port("PORT", ValkeyWriter), "VALKEY_ADDR=" + s.Addr(string(ValkeyKind))}
	}},
	{KafkaSource, "eventing", func(s *System) []string {
		return []string{
			s.port("PORT", KafkaSource), "K_SINK=http://" + s.Addr(RedisWriter) + "/",
			"KAFKA_BOOTSTRAP_SERVERS=" + s.Addr(string(KafkaKind)),
			// A static member: the successor of a killed one has its partitions at once, not when its session has ended.
			"KAFKA_GROUP_INSTANCE_ID=local",
		}
	}},
	{RabbitMQSource, "eventing", func(s *System) []string {
		return append(s.rabbit(), s.port("PORT", RabbitMQSource), "K_SINK=http://"+s.Addr(ValkeyWriter)+"/")
	}},
	{Publisher, "functions", func(s *System) []string {
		return append(s.rabbit(), "PORT", s.port("REST_PORT", Publisher), s.port("GRPC_PORT", PublisherGRPC),
			"KAFKA_BOOTSTRAP_SERVERS="+s.Addr(string(KafkaKind)))
	}},
	{Ingress, "functions", func(s *System) []string {
		return []string{s.port("PORT", Ingress), "PUBLISHER_ADDR=" + s.Addr(PublisherGRPC)}
	}},
}

func (s *System) port(variable, name string) string {
	return variable + "=" + strconv.Itoa(s.ports[name])
}

// rabbit is what a client of RabbitMQ is told. Who brings a server of his own brings the user too.
func (s *System) rabbit() []string {
	env := []string{"RABBITMQ_ADDR=" + s.Addr(string(RabbitMQKind))}
	for variable, ours := range map[string]string{"RABBITMQ_USERNAME": RabbitUser, "RABBITMQ_PASSWORD": RabbitPassword} {
		if s.options.Servers[RabbitMQKind] == "" || os.Getenv(variable) == "" {
			env = append(env, variable+"="+ours)
		}
	}
	return env
}

// NewSystem returns a system that is not started yet. It keeps everything in dir: data, log and bin.
func NewSystem(dir string, options Options) (*System, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	s := &System{dir: abs, options: options, ports: map[string]int{}, progress: io.Discard}
	if s.options.Bin == "" {
		s.options.Bin = filepath.Join(abs, "bin")
	}
	for name := range DefaultPorts {
		if s.options.Servers[Kind(name)] != "" {
			continue
		}
		if s.ports[name] = options.Ports[name]; s.ports[name] == 0 {
			if s.ports[name], err = FreePort(); err != nil {
				return nil, err
			}
		}
	}
	for _, kind := range Kinds {
		if s.options.Servers[kind] == "" {
			s.all = append(s.all, s.server(kind))
		}
	}
	s.servers = len(s.all)
	for _, p := range programs {
		s.all = append(s.all, s.program(p))
	}
	if options.Restart {
		for _, p := range s.all {
			p.onDeath = s.revive
		}
	}
	return s, nil
}

func (s *System) server(kind Kind) *Process {
	start := map[Kind]func(string, int, ...Option) *Process{
		KafkaKind: Kafka, RabbitMQKind: RabbitMQ, RedisKind: Redis, ValkeyKind: Valkey,
	}[kind]
	options := append([]Option{LogTo(s.log(string(kind)))}, s.options.ServerOptions[kind]...)
	return start(filepath.Join(s.dir, "data", string(kind)), s.ports[string(kind)], options...)
}

func (s *System) program(p program) *Process {
	addr := s.Addr(p.name)
	return NewProcess(Spec{
		Name: p.name, Log: s.log(p.name), Addr: addr,
		Path:  filepath.Join(s.options.Bin, p.name),
		Env:   slices.Concat([]string{"HOST=" + loopback}, p.env(s), s.options.Env[""], s.options.Env[p.name]),
		Ready: func(ctx context.Context) error { return getReady(ctx, addr) },
	})
}

func (s *System) log(name string) string { return filepath.Join(s.dir, "log", name+".log") }

// getReady asks a program of ours whether it can answer.
func getReady(ctx context.Context, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/readyz", nil)
	if err != nil {
		return err
	}
	r.Close = true
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", r.URL, answer.Status)
	}
	return nil
}

// Addr is host:port where the server or program of that name serves, also for a server that is used instead of one of its
// own. The name may be [PublisherGRPC]. It is known before the start.
func (s *System) Addr(name string) string {
	if addr := s.options.Servers[Kind(name)]; addr != "" {
		return addr
	}
	return net.JoinHostPort(loopback, strconv.Itoa(s.ports[name]))
}

// URL is where reports are posted to.
func (s *System) URL() string { return "http://" + s.Addr(Ingress) }

// Process returns the server or program of that name, nil if the system has none of its own.
func (s *System) Process(name string) *Process {
	for _, p := range s.all {
		if p.Name() == name {
			return p
		}
	}
	return nil
}

// Processes are all of them, servers first, in the order in which they are started.
func (s *System) Processes() []*Process { return slices.Clone(s.all) }

// Start installs and starts the servers, builds and starts the programs, and returns once all are ready. It tells what it
// does on progress, and later also what died and was started again; nil is allowed. When it fails, nothing is left
// running. The context bounds the start only.
func (s *System) Start(ctx context.Context, progress io.Writer) error {
	if progress != nil {
		s.progress = &lines{to: progress}
	}
	if err := s.portsFree(); err != nil {
		return err
	}
	if err := s.takeDir(); err != nil {
		return err
	}
	s.mu.Lock()
	s.reviving, s.stopReviving = context.WithCancel(context.Background())
	s.mu.Unlock()
	if err := s.startAll(ctx); err != nil {
		return errors.Join(err, s.Kill())
	}
	return nil
}

func (s *System) startAll(ctx context.Context) error {
	servers := s.all[:s.servers]
	err := together(ctx, 2, func(ctx context.Context, i int) error {
		if i == 0 {
			return s.build(ctx)
		}
		if len(servers) == 0 {
			return nil
		}
		var kinds []Kind
		for _, p := range servers {
			kinds = append(kinds, Kind(p.Name()))
		}
		if err := Install(ctx, s.progress, kinds...); err != nil {
			return err
		}
		return together(ctx, len(servers), func(ctx context.Context, i int) error {
			return s.startOne(ctx, servers[i])
		})
	})
	if err != nil {
		return err
	}
	for _, p := range s.all[s.servers:] {
		if err := s.startOne(ctx, p); err != nil {
			return err
		}
	}
	return s.awaitBrokers(ctx)
}

// brokersPatience is how long Start waits for the programs to find their brokers. A program is ready without: this is for
// who posts a first report at once and wants to see it counted.
const brokersPatience = 15 * time.Second

// awaitBrokers waits until the publisher and the sources are connected, and says so if one is not.
func (s *System) awaitBrokers(ctx context.Context) error {
	patient, cancel := context.WithTimeout(ctx, brokersPatience)
	defer cancel()
	for _, name := range []string{Publisher, KafkaSource, RabbitMQSource} {
		for away := brokersAway(patient, s.Addr(name)); away != ""; away = brokersAway(patient, s.Addr(name)) {
			select {
			case <-patient.Done():
				fmt.Fprintf(s.progress, "%s still waits: %s\n", name, away)
				return ctx.Err()
			case <-time.After(20 * time.Millisecond):
			}
		}
	}
	return nil
}

// brokersAway is what a program of ours says of its peers in /readyz, unless all are connected.
func brokersAway(ctx context.Context, addr string) string {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+addr+"/readyz", nil)
	if err != nil {
		return err.Error()
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return err.Error()
	}
	defer answer.Body.Close()
	var status struct{ Peers map[string]string }
	if err := json.NewDecoder(answer.Body).Decode(&status); err != nil {
		return err.Error()
	}
	for peer, state := range status.Peers {
		if !strings.HasPrefix(state, "connected") {
			return peer + ": " + state
		}
	}
	return ""
}

// patience is how long a server or program may take to be ready. Kafka's eight seconds are the longest on an idle machine.
const patience = 90 * time.Second

func (s *System) startOne(ctx context.Context, p *Process) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	start := time.Now()
	if err := p.Start(ctx); err != nil {
		return err
	}
	fmt.Fprintf(s.progress, "%-15s ready at %s after %.2f s\n", p.Name(), p.Addr(), time.Since(start).Seconds())
	return nil
}

// together runs n functions at once. The first error ends the context of the others and is returned when all have ended.
func together(ctx context.Context, n int, do func(ctx context.Context, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var wg sync.WaitGroup
	errs := make(chan error, n)
	for i := range n {
		wg.Go(func() {
			if err := do(ctx, i); err != nil {
				errs <- err
				cancel(err)
			}
		})
	}
	wg.Wait()
	close(errs)
	return <-errs
}

// takeDir keeps two systems from having the same data at once. The lock is the kernel's: it ends with this process.
func (s *System) takeDir() error {
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(filepath.Join(s.dir, "lock"), os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		_ = f.Close()
		return fmt.Errorf("%s is in use by another Isobar that runs", s.dir)
	}
	s.lock = f
	return nil
}

func (s *System) leaveDir() {
	if s.lock != nil {
		_ = s.lock.Close()
		s.lock = nil
	}
}

// portsFree names every port that is taken.
func (s *System) portsFree() error {
	var errs []error
	for _, name := range slices.Sorted(maps.Keys(s.ports)) {
		if err := portFree(s.Addr(name)); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w; %s sets another", name, err, PortVariable(name)))
		}
	}
	return errors.Join(errs...)
}

// build builds all programs, unless they are given.
func (s *System) build(ctx context.Context) error {
	if s.options.Bin != filepath.Join(s.dir, "bin") {
		return nil
	}
	root, err := moduleRoot()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.options.Bin, 0o755); err != nil {
		return err
	}
	args := []string{"build", "-o", s.options.Bin + string(filepath.Separator)}
	static := "CGO_ENABLED=0"
	if s.options.Race {
		args = append(args, "-race")
		static = "CGO_ENABLED=1"
	}
	for _, p := range programs {
		args = append(args, "./"+p.folder+"/"+p.name)
	}
	return step(s.progress, "building the programs", func() error {
		cmd := exec.CommandContext(ctx, "go", args...)
		cmd.Dir, cmd.Env = root, append(os.Environ(), static)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), errors.Join(err, ctx.Err()), out)
		}
		return nil
	})
}

// moduleRoot is the directory of this module's go.mod, looked for upwards from the working directory.
func moduleRoot() (string, error) {
	start, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for dir := start; ; dir = filepath.Dir(dir) {
		b, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(b), "module isobar.dev\n") {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("build the programs: %s is not inside isobar.dev's source", start)
		}
	}
}

// revive starts again what has died.
func (s *System) revive(p *Process, how string) {
	s.mu.Lock()
	ctx := s.reviving
	if ctx.Err() != nil {
		s.mu.Unlock()
		return
	}
	s.revivals.Add(1)
	s.mu.Unlock()
	defer s.revivals.Done()

	for pause := 100 * time.Millisecond; ; pause = min(2*pause, 5*time.Second) {
		fmt.Fprintf(s.progress, "%s died (%s), it is started again\n", p.Name(), how)
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		err := s.startOne(ctx, p)
		if err == nil || ctx.Err() != nil || p.Pid() != 0 {
			return
		}
		how = err.Error()
	}
}

// Stop ends everything in the order of the road, the servers last, and returns when nothing is left. Each gets up to ten
// seconds to end by itself; when ctx ends, the rest is killed. Stopping what does not run is no error.
func (s *System) Stop(ctx context.Context) error {
	s.noMoreRevivals()
	defer s.leaveDir()
	stop := func(p *Process) error {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		running := p.Pid() != 0
		start := time.Now()
		err := p.Stop(ctx)
		if running && err == nil {
			fmt.Fprintf(s.progress, "%-15s stopped after %.2f s\n", p.Name(), time.Since(start).Seconds())
		}
		return err
	}
	var errs []error
	for _, p := range slices.Backward(s.all[s.servers:]) {
		errs = append(errs, stop(p))
	}
	ends := make([]error, s.servers)
	var wg sync.WaitGroup
	for i, p := range s.all[:s.servers] {
		wg.Go(func() { ends[i] = stop(p) })
	}
	wg.Wait()
	return errors.Join(append(errs, ends...)...)
}

// Kill ends everything at once with SIGKILL and returns when nothing is left.
func (s *System) Kill() error {
	s.noMoreRevivals()
	defer s.leaveDir()
	var errs []error
	for _, p := range slices.Backward(s.all) {
		errs = append(errs, p.Kill())
	}
	return errors.Join(errs...)
}

func (s *System) noMoreRevivals() {
	s.mu.Lock()
	if s.stopReviving != nil {
		s.stopReviving()
	}
	s.mu.Unlock()
	s.revivals.Wait()
}

// lines lets several goroutines write lines to one writer.
type lines struct {
	mu sync.Mutex
	to io.Writer
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.to.Write(b)
}

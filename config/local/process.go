package local

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// tag is the environment variable by which every descendant of a [Process] is known, however far it has moved away from
// its parent: Erlang puts the helpers that it starts into sessions of their own.
const tag = "ISOBAR_PROCESS"

// Spec describes an operating system process.
type Spec struct {
	Name string   // what people call it: "kafka", "ingress"
	Log  string   // the file that gets its output, appended to over restarts; none: the output is dropped
	Path string   // the program
	Args []string // its arguments
	Env  []string // added to this process's own environment: NAME=value sets, NAME alone takes it out
	Dir  string   // its working directory

	// Addr is host:port where it serves. Empty is allowed; else the port must be free when it starts.
	Addr string
	// Ready tells whether it can do its work. Start calls it again and again until it returns nil. None: the process is
	// ready once Addr takes connections, or at once if it has no Addr.
	Ready func(ctx context.Context) error
}

// Process is one supervised operating system process: a server or a program of ours. It can be started, stopped, killed
// and started again as often as wanted, under the same address and with the same data. It leads a process group of its
// own, and dies with the process that started it, whatever ends that one. Its methods may be called from any goroutine.
type Process struct {
	name, log string
	port      int // of addr; 0 until a free one has been picked
	prepare   func(ctx context.Context, port int) (Spec, error)
	onDeath   func(p *Process, how string) // called when it ends without having been asked to, once it was ready

	turn sync.Mutex // held by whoever is starting or ending it

	mu   sync.Mutex
	addr string
	run  *run // the latest; nil before the first start
}

// run is one life of a process.
type run struct {
	pid    int
	tag    string
	exited chan struct{} // closed once it has been waited for
	state  *os.ProcessState
	asked  bool // whether it ended because Kill or Stop was called; guarded by Process.mu
}

// NewProcess returns a process that is not started yet.
func NewProcess(spec Spec) *Process {
	return &Process{
		name: spec.Name, log: spec.Log, addr: spec.Addr,
		prepare: func(context.Context, int) (Spec, error) { return spec, nil },
	}
}

// Name is what people call it.
func (p *Process) Name() string { return p.name }

// Log is the path of the file that gets its output.
func (p *Process) Log() string { return p.log }

// Addr is host:port where it serves. It is empty before the first start of a process that picks its port itself, and
// stays the same from then on.
func (p *Process) Addr() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.addr
}

// Pid is the process's id, 0 when it does not run.
func (p *Process) Pid() int {
	if r := p.current(); r != nil {
		return r.pid
	}
	return 0
}

// current is the run that has not ended, or nil.
func (p *Process) current() *run {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.run == nil {
		return nil
	}
	select {
	case <-p.run.exited:
		return nil
	default:
		return p.run
	}
}

// Start starts it and returns once it is ready. If it dies first, or ctx ends first, nothing of it is left and the error
// ends with the last lines of its log. The context bounds the start only, not the life of the process.
func (p *Process) Start(ctx context.Context) error {
	p.turn.Lock()
	defer p.turn.Unlock()
	return p.start(ctx)
}

func (p *Process) start(ctx context.Context) error {
	if pid := p.Pid(); pid != 0 {
		return fmt.Errorf("start %s: it runs already, as process %d", p.name, pid)
	}
	spec, err := p.prepare(ctx, p.port)
	if err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	if err := portFree(spec.Addr); err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	r, err := spawn(spec)
	if err != nil {
		return fmt.Errorf("start %s: %w", p.name, err)
	}
	p.mu.Lock()
	p.run, p.addr = r, spec.Addr
	p.mu.Unlock()

	if err := awaitReady(ctx, spec, r); err != nil {
		p.mark(r)
		r.destroy()
		return fmt.Errorf("start %s: %w%s", p.name, err, p.tail())
	}
	if p.onDeath != nil {
		go func() {
			<-r.exited
			if !p.wasAsked(r) {
				p.onDeath(p, r.state.String())
			}
		}()
	}
	return nil
}

// mark notes that the end of the run is wanted.
func (p *Process) mark(r *run) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r.asked = true
}

// Kill ends it with SIGKILL, and everything that it has started, and returns once all of it is gone and its port is free.
// Killing what does not run is no error.
func (p *Process) Kill() error {
	p.turn.Lock()
	defer p.turn.Unlock()
	return p.kill()
}

func (p *Process) kill() error {
	p.mu.Lock()
	r, addr := p.run, p.addr
	p.mu.Unlock()
	if r == nil {
		return nil
	}
	p.mark(r)
	r.destroy()
	if err := awaitPort(addr); err != nil {
		return fmt.Errorf("kill %s: %w", p.name, err)
	}
	return nil
}

// Stop asks it with SIGTERM to end and waits until it has. When ctx ends first, it is killed, and that is the error.
// Stopping what does not run is no error.
func (p *Process) Stop(ctx context.Context) error {
	p.turn.Lock()
	defer p.turn.Unlock()
	r := p.current()
	if r == nil {
		return p.kill() // a descendant may have outlived it
	}
	p.mark(r)
	_ = syscall.Kill(r.pid, syscall.SIGTERM)
	_ = syscall.Kill(r.pid, syscall.SIGCONT) // a paused process would not see it
	select {
	case <-r.exited:
		return p.kill()
	case <-ctx.Done():
		return errors.Join(fmt.Errorf("stop %s: killed, as it did not end in time: %w", p.name, ctx.Err()), p.kill())
	}
}

// Restart kills it, if it runs, and starts it.
func (p *Process) Restart(ctx context.Context) error {
	p.turn.Lock()
	defer p.turn.Unlock()
	if err := p.kill(); err != nil {
		return err
	}
	return p.start(ctx)
}

// Pause stops its whole group from running (SIGSTOP): its connections stay open and nobody answers.
func (p *Process) Pause() error { return p.signal(syscall.SIGSTOP) }

// Resume lets it go on after Pause.
func (p *Process) Resume() error { return p.signal(syscall.SIGCONT) }

func (p *Process) signal(s syscall.Signal) error {
	r := p.current()
	if r == nil {
		return fmt.Errorf("send %v to %s: it does not run", s, p.name)
	}
	if err := syscall.Kill(-r.pid, s); err != nil {
		return fmt.Errorf("send %v to %s: %w", s, p.name, err)
	}
	return nil
}

func (p *Process) wasAsked(r *run) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return r.asked
}

// tail is the end of the log, for an error message.
func (p *Process) tail() string {
	lines := Tail(p.log, 15)
	if lines == "" {
		return ""
	}
	return "\nthe last lines of " + p.log + ":\n" + lines
}

// Tail returns the last n lines of a file, and nothing if it can't be read.
func Tail(path string, n int) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	const most = 64 << 10
	if size, err := f.Seek(0, io.SeekEnd); err == nil {
		_, _ = f.Seek(max(0, size-most), io.SeekStart)
	}
	b, _ := io.ReadAll(f)
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}

var serial struct {
	sync.Mutex
	n int
}

// spawn starts the process. The kernel's promise to kill it with its parent is tied to the parent's thread, not to the
// parent: so one thread is kept for it until it has ended.
func spawn(spec Spec) (*run, error) {
	serial.Lock()
	serial.n++
	r := &run{tag: fmt.Sprintf("%d-%d-%s", os.Getpid(), serial.n, spec.Name), exited: make(chan struct{})}
	serial.Unlock()

	cmd := exec.Command(spec.Path, spec.Args...)
	cmd.Env = append(environ(spec.Env), tag+"="+r.tag)
	cmd.Dir = spec.Dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if spec.Log != "" {
		if err := os.MkdirAll(filepath.Dir(spec.Log), 0o755); err != nil {
			return nil, err
		}
		log, err := os.OpenFile(spec.Log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
		if err != nil {
			return nil, err
		}
		defer log.Close()
		cmd.Stdout, cmd.Stderr = log, log
	}

	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		if err == nil {
			r.pid = cmd.Process.Pid
		}
		started <- err
		if err != nil {
			return
		}
		_ = cmd.Wait() // how it ended is in its state
		r.state = cmd.ProcessState
		close(r.exited)
	}()
	return r, <-started
}

// environ is this process's own environment with the changes.
func environ(changes []string) []string {
	env := os.Environ()
	for _, c := range changes {
		name, _, set := strings.Cut(c, "=")
		env = slices.DeleteFunc(env, func(v string) bool { return strings.HasPrefix(v, name+"=") })
		if set {
			env = append(env, c)
		}
	}
	return env
}

// awaitReady asks until the process is ready. There is no event to wait for, so it asks often at first and then less.
func awaitReady(ctx context.Context, spec Spec, r *run) error {
	ready := spec.Ready
	if ready == nil {
		ready = func(ctx context.Context) error { return connects(ctx, spec.Addr) }
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 50*time.Millisecond) {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-r.exited:
			return fmt.Errorf("it ended before it was ready: %v", r.state)
		case <-ctx.Done():
			return fmt.Errorf("it is not ready: %w (%w)", err, ctx.Err())
		case <-time.After(pause):
		}
	}
}

// destroy kills the run and all its descendants and returns when none is left.
func (r *run) destroy() {
	select {
	case <-r.exited:
	default: // it has not been waited for, so its id can't be anybody else's
		_ = syscall.Kill(-r.pid, syscall.SIGKILL)
		<-r.exited
	}
	for pause := time.Millisecond; ; pause = min(2*pause, 20*time.Millisecond) {
		left := tagged(r.tag)
		if len(left) == 0 {
			return
		}
		for _, pid := range left {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
		time.Sleep(pause)
	}
}

// tagged lists the living processes whose tag begins so.
func tagged(prefix string) []int {
	want := []byte(tag + "=" + prefix)
	var pids []int
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		env, err := os.ReadFile("/proc/" + e.Name() + "/environ") // empty for one that is dead and not yet waited for
		if err != nil {
			continue
		}
		for v := range bytes.SplitSeq(env, []byte{0}) {
			if bytes.HasPrefix(v, want) {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

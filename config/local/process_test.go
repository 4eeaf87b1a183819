package local

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestMain makes the test binary, called by another name, stand for what a test needs to run.
func TestMain(m *testing.M) {
	switch name := filepath.Base(os.Args[0]); {
	case name == "parent":
		parent()
	case slices.ContainsFunc(programs, func(p program) bool { return p.name == name }):
		fake()
	default:
		os.Exit(m.Run())
	}
}

// fake stands for a program of ours: it says what it was told and can answer.
func fake() {
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	for _, v := range os.Environ() {
		fmt.Println(v)
	}
	if os.Getenv("FAKE") == "dies" {
		fmt.Println("of a bad setting")
		os.Exit(3)
	}
	port := os.Getenv("PORT")
	if port == "" {
		port = os.Getenv("REST_PORT")
	}
	l, err := net.Listen("tcp", net.JoinHostPort(os.Getenv("HOST"), port))
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /readyz", func(http.ResponseWriter, *http.Request) {})
	go http.Serve(l, mux) //nolint:errcheck // it serves until the process ends
	<-term
}

// parent starts everything, says so, and waits to be killed.
func parent() {
	ctx := context.Background()
	s, err := NewSystem(os.Getenv("DIR"), Options{Bin: os.Getenv("BIN")})
	if err == nil {
		err = s.Start(ctx, os.Stderr)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	fmt.Println("ready")
	select {}
}

// as makes the test binary callable by the names.
func as(t *testing.T, names ...string) (bin string) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	bin = t.TempDir()
	for _, n := range names {
		if err := os.Symlink(self, filepath.Join(bin, n)); err != nil {
			t.Fatal(err)
		}
	}
	return bin
}

// fakes are stand-ins for all programs of ours.
func fakes(t *testing.T) (bin string) {
	t.Helper()
	var names []string
	for _, p := range programs {
		names = append(names, p.name)
	}
	return as(t, names...)
}

// shell is a process that runs a script.
func shell(t *testing.T, script, addr string) *Process {
	t.Helper()
	log := filepath.Join(t.TempDir(), "shell.log")
	ready := func(context.Context) error {
		if !strings.Contains(Tail(log, 5), "ready") {
			return fmt.Errorf("it has not said so yet")
		}
		return nil
	}
	p := NewProcess(Spec{Name: "shell", Log: log, Path: "/bin/sh", Args: []string{"-c", script}, Addr: addr, Ready: ready})
	t.Cleanup(func() {
		if err := p.Kill(); err != nil {
			t.Error(err)
		}
	})
	return p
}

func TestProcess(t *testing.T) {
	mine := fmt.Sprintf("%d-", os.Getpid())
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	none := func(t *testing.T) {
		t.Helper()
		if left := tagged(mine); len(left) > 0 {
			t.Errorf("processes %v are left", left)
		}
	}

	t.Run("one that dies before it is ready is an error with its last words", func(t *testing.T) {
		err := shell(t, "echo I can not; exit 7", "").Start(t.Context())
		if err == nil || !strings.Contains(err.Error(), "exit status 7") || !strings.Contains(err.Error(), "I can not") {
			t.Errorf("error %v", err)
		}
		none(t)
	})
	t.Run("one that is never ready is gone when the context ends", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if err := shell(t, "sleep 1000", "").Start(ctx); err == nil {
			t.Error("no error")
		}
		none(t)
	})
	t.Run("one that runs is not started twice", func(t *testing.T) {
		p := shell(t, "echo ready; exec sleep 1000", "")
		must(t, p.Start(t.Context()))
		if err := p.Start(t.Context()); err == nil {
			t.Error("no error")
		}
	})
	t.Run("Kill takes what it has started, in its group and in a session of its own", func(t *testing.T) {
		p := shell(t, "sleep 1000 & setsid sleep 1000 & trap '' TERM; echo ready; wait", "")
		must(t, p.Start(t.Context()))
		must(t, p.Kill())
		none(t)
		if p.Pid() != 0 {
			t.Error("it still has an id")
		}
	})
	t.Run("Stop lets it end by itself", func(t *testing.T) {
		p := shell(t, "trap 'echo goodbye; exit' TERM; echo ready; sleep 1000 & wait", "")
		must(t, p.Start(t.Context()))
		must(t, p.Stop(t.Context()))
		if got := Tail(p.Log(), 1); got != "goodbye" {
			t.Errorf("its last words are %q", got)
		}
		none(t)
	})
	t.Run("Stop kills it when the context ends", func(t *testing.T) {
		p := shell(t, "trap '' TERM; echo ready; while :; do sleep 1000; done", "")
		must(t, p.Start(t.Context()))
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if err := p.Stop(ctx); err == nil {
			t.Error("no error")
		}
		none(t)
	})
	t.Run("Kill and Stop of what does not run are no errors", func(t *testing.T) {
		p := shell(t, "exit", "")
		must(t, p.Kill())
		must(t, p.Stop(t.Context()))
	})
	t.Run("one that is paused does nothing until it is resumed", func(t *testing.T) {
		p := shell(t, "trap 'echo heard' USR1; echo ready; while :; do :; done", "")
		must(t, p.Start(t.Context()))
		must(t, p.Pause())
		await(t, "it is stopped", func() bool { return state(p.Pid()) == "T" })
		must(t, syscall.Kill(p.Pid(), syscall.SIGUSR1))
		if strings.Contains(Tail(p.Log(), 5), "heard") {
			t.Error("it heard a signal")
		}
		must(t, p.Resume())
		await(t, "it hears the signal", func() bool { return strings.Contains(Tail(p.Log(), 5), "heard") })
	})
	t.Run("one that is paused can be stopped", func(t *testing.T) {
		p := shell(t, "echo ready; exec sleep 1000", "")
		must(t, p.Start(t.Context()))
		must(t, p.Pause())
		must(t, p.Stop(t.Context()))
		none(t)
	})
	t.Run("a taken port is named with its holder", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		must(t, err)
		defer l.Close()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		err = shell(t, "echo ready; exec sleep 1000", l.Addr().String()).Start(t.Context())
		want := fmt.Sprintf("port %s is taken by process %d (", port, os.Getpid())
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v, want %q", err, want)
		}
	})
}

// state is the letter by which /proc tells what a process does.
func state(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, after, _ := strings.Cut(string(b), ") ")
	letter, _, _ := strings.Cut(after, " ")
	return letter
}

// await waits for what nothing tells of.
func await(t *testing.T, what string, happened func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !happened(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("it does not happen that %s", what)
		}
	}
}

func TestNothingOutlivesItsParent(t *testing.T) {
	if err := Install(t.Context(), t.Output()); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(filepath.Join(as(t, "parent"), "parent"))
	cmd.Env = append(os.Environ(), "DIR="+t.TempDir(), "BIN="+fakes(t))
	cmd.Stderr = t.Output()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, _ := bufio.NewReader(out).ReadString('\n')
	theirs := fmt.Sprintf("%d-", cmd.Process.Pid)
	if got := len(tagged(theirs)); line != "ready\n" || got < len(programs)+len(Kinds) {
		t.Errorf("it says %q and %d processes run", line, got)
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	await(t, "all processes are gone", func() bool { return len(tagged(theirs)) == 0 })
}

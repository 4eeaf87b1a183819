package counts_test

import (
	"net"
	"sync"
	"testing"
)

// wire is a TCP proxy that can cut what goes through it.
type wire struct {
	listener net.Listener

	mu     sync.Mutex
	target string
	deaf   bool // what the server answers is dropped
	open   map[net.Conn]bool
	asked  chan struct{} // has one when an answer was dropped
	work   sync.WaitGroup
}

func newWire(t testing.TB, target string) *wire {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	w := &wire{listener: l, target: target, open: map[net.Conn]bool{}, asked: make(chan struct{}, 1)}
	w.work.Go(w.accept)
	t.Cleanup(func() {
		_ = l.Close()
		w.cut()
		w.work.Wait()
	})
	return w
}

func (w *wire) addr() string { return w.listener.Addr().String() }

// cut closes all connections.
func (w *wire) cut() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for c := range w.open {
		_ = c.Close()
	}
	clear(w.open)
}

// lead sends new connections elsewhere.
func (w *wire) lead(target string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.target = target
}

// deafen drops what servers answer from now on, or no longer.
func (w *wire) deafen(deaf bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.deaf = deaf
}

func (w *wire) accept() {
	for {
		client, err := w.listener.Accept()
		if err != nil {
			return
		}
		w.mu.Lock()
		target := w.target
		w.mu.Unlock()
		server, err := net.Dial("tcp", target)
		if err != nil {
			_ = client.Close()
			continue
		}
		w.mu.Lock()
		w.open[client], w.open[server] = true, true
		w.mu.Unlock()
		w.work.Go(func() { w.pass(server, client, false) })
		w.work.Go(func() { w.pass(client, server, true) })
	}
}

func (w *wire) pass(to, from net.Conn, answers bool) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if n > 0 {
			w.mu.Lock()
			deaf := w.deaf
			w.mu.Unlock()
			if answers && deaf {
				select {
				case w.asked <- struct{}{}:
				default:
				}
				continue
			}
			if _, err := to.Write(buf[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

package rabbit

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"testing"
	"time"
)

// amqpFrame is a frame of the type (0 AMQP, 1 SASL) with an extended header of whole words.
func amqpFrame(kind byte, extended int, body ...byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(8+4*extended+len(body)))
	b = append(b, byte(2+extended), kind, 0, 7)
	return append(append(b, bytes.Repeat([]byte{0}, 4*extended)...), body...)
}

// dispositionOf is the performative with its fields, in the short form of a list.
func dispositionOf(fields ...byte) []byte {
	return append([]byte{0, codeSmallUlong, disposition, codeList8, byte(len(fields) + 1), 5}, fields...)
}

func dispositionLong(fields ...byte) []byte {
	b := []byte{0, codeSmallUlong, disposition, codeList32}
	b = binary.BigEndian.AppendUint32(b, uint32(len(fields)+4))
	b = binary.BigEndian.AppendUint32(b, 5)
	return append(b, fields...)
}

func outcomeOf(code byte) []byte { return []byte{0, codeSmallUlong, code, codeList0} }

func join(parts ...any) []byte {
	var b []byte
	for _, p := range parts {
		switch p := p.(type) {
		case int:
			b = append(b, byte(p))
		case []byte:
			b = append(b, p...)
		}
	}
	return b
}

const (
	accepted = outcomeAccepted
	rejected = outcomeRejected
	released = outcomeReleased
	modified = 0x27
	received = 0x23
)

func TestFrameReader(t *testing.T) {
	rejection := join(0, codeSmallUlong, rejected, codeList8, 5, 1, 0, codeSmallUlong, 0x1d, codeList0)
	for _, c := range []struct {
		name string
		body []byte
		want []byte // nil: it is an error; otherwise what the client reads
	}{
		{"accepted is untouched", dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue, outcomeOf(accepted))...), dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue, outcomeOf(accepted))...)},
		{"rejected is untouched", dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue, rejection)...), dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue, rejection)...)},
		{"released becomes rejected", dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue, outcomeOf(released))...), dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue, outcomeOf(rejected))...)},
		{"released, a range in one byte each", dispositionOf(join(codeTrue, codeSmallUint, 3, codeSmallUint, 9, codeTrue, outcomeOf(released))...), dispositionOf(join(codeTrue, codeSmallUint, 3, codeSmallUint, 9, codeTrue, outcomeOf(rejected))...)},
		{"released, a range in four bytes each", dispositionOf(join(codeTrue, codeUint, 0, 0, 0x53, 0x26, codeUint, 0, 0, 0x53, 0x27, codeTrue, outcomeOf(released))...), dispositionOf(join(codeTrue, codeUint, 0, 0, 0x53, 0x26, codeUint, 0, 0, 0x53, 0x27, codeTrue, outcomeOf(rejected))...)},
		{"released, the list in its long form", dispositionLong(join(codeTrue, codeUint0, codeNull, codeTrue, outcomeOf(released))...), dispositionLong(join(codeTrue, codeUint0, codeNull, codeTrue, outcomeOf(rejected))...)},
		{"released, settled as a byte", dispositionOf(join(codeTrue, codeUint0, codeNull, codeBoolean, 1, outcomeOf(released))...), dispositionOf(join(codeTrue, codeUint0, codeNull, codeBoolean, 1, outcomeOf(rejected))...)},
		{"released, not settled yet", dispositionOf(join(codeTrue, codeUint0, codeNull, codeFalse, outcomeOf(released))...), dispositionOf(join(codeTrue, codeUint0, codeNull, codeFalse, outcomeOf(rejected))...)},
		{"released, batchable behind it", dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue, outcomeOf(released), codeTrue)...), dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue, outcomeOf(rejected), codeTrue)...)},
		{"released by the broker as the sender is our own word", dispositionOf(join(codeFalse, codeUint0, codeNull, codeTrue, outcomeOf(released))...), dispositionOf(join(codeFalse, codeUint0, codeNull, codeTrue, outcomeOf(released))...)},
		{"settled by the broker as the sender, without a state", dispositionOf(join(codeFalse, codeUint0, codeNull, codeTrue)...), dispositionOf(join(codeFalse, codeUint0, codeNull, codeTrue)...)},
		{"not settled, without a state", dispositionOf(join(codeTrue, codeSmallUint, 7)...), dispositionOf(join(codeTrue, codeSmallUint, 7)...)},

		{"settled without a state", dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue)...), nil},
		{"settled as a byte, without a state", dispositionOf(join(codeTrue, codeUint0, codeNull, codeBoolean, 1)...), nil},
		{"settled, the state null", dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue, codeNull)...), nil},
		{"modified is none that is known", dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue, outcomeOf(modified))...), nil},
		{"received is no outcome", dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue, outcomeOf(received))...), nil},
		{"an outcome in the long form", dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue, 0, 0x80, 0, 0, 0, 0, 0, 0, 0, released, codeList0)...), nil},
		{"a role that is none", dispositionOf(join(codeNull, codeUint0)...), nil},
		{"a first that is no number", dispositionOf(join(codeTrue, codeTrue)...), nil},
		{"no fields", join(0, codeSmallUlong, disposition, codeList0), nil},
		{"its own descriptor in the long form", join(0, 0x80, 0, 0, 0, 0, 0, 0, 0, disposition, codeList0), nil},

		{"a transfer that looks like a disposition inside", join(0, codeSmallUlong, 0x14, dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue, outcomeOf(released))...)), join(0, codeSmallUlong, 0x14, dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue, outcomeOf(released))...))},
		{"a heartbeat", []byte{}, []byte{}},
		{"a body that is none", []byte{1, 2, 3}, []byte{1, 2, 3}},
	} {
		for _, extended := range []int{0, 2} {
			t.Run(fmt.Sprintf("%s, %d words of extended header", c.name, extended), func(t *testing.T) {
				sasl := amqpFrame(1, 0, dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue, outcomeOf(released))...)...)
				before := join([]byte("AMQP\x03\x01\x00\x00"), sasl, []byte("AMQP\x00\x01\x00\x00"), amqpFrame(0, 0))
				in := join(before, amqpFrame(0, extended, c.body...), amqpFrame(0, extended, c.body...))
				want := join(before, amqpFrame(0, extended, c.want...), amqpFrame(0, extended, c.want...))
				check := func(pieces ...[]byte) {
					var f frameReader
					var out []byte
					for _, p := range pieces {
						p = slices.Clone(p)
						if err := f.read(p); err != nil {
							if c.want != nil || !errors.Is(err, errFrame) {
								t.Errorf("the error is %v", err)
							}
							return
						}
						out = append(out, p...)
					}
					if c.want == nil {
						t.Fatalf("no error")
					}
					if !bytes.Equal(out, want) {
						t.Fatalf("read\n%x\nwant\n%x", out, want)
					}
				}
				for i := range len(in) + 1 {
					check(in[:i], in[i:])
				}
				check(slices.Collect(slices.Chunk(in, 1))...)
			})
		}
	}
}

// FuzzFrameReader: however the stream is cut, it reads the same, and nothing but one byte of a disposition changes.
func FuzzFrameReader(f *testing.F) {
	f.Add(join([]byte("AMQP\x00\x01\x00\x00"), amqpFrame(0, 1, dispositionOf(join(codeTrue, codeUint0, codeNull, codeTrue, outcomeOf(released))...)...)), 9)
	f.Add(amqpFrame(0, 0, dispositionLong(join(codeTrue, codeSmallUint, 1, codeUint, 0, 0, 0, 2, codeTrue, outcomeOf(accepted))...)...), 20)
	f.Add([]byte{0, 0, 0, 9, 200, 0, 0, 0, 0}, 3)
	f.Fuzz(func(t *testing.T, stream []byte, at int) {
		whole, cut := slices.Clone(stream), slices.Clone(stream)
		var a, b frameReader
		errWhole := a.read(whole)
		at = min(max(at, 0), len(cut))
		errCut := b.read(cut[:at])
		if errCut == nil {
			errCut = b.read(cut[at:])
		}
		if (errWhole == nil) != (errCut == nil) || errWhole == nil && !bytes.Equal(whole, cut) {
			t.Errorf("whole %x %v, cut %x %v", whole, errWhole, cut, errCut)
		}
		for i := range whole {
			if whole[i] != stream[i] && (stream[i] != released || whole[i] != rejected) {
				t.Errorf("byte %d has become %x", i, whole[i])
			}
		}
	})
}

// TestWireKeepsOrder: gathered writes leave whole and in order.
func TestWireKeepsOrder(t *testing.T) {
	here, there := net.Pipe()
	w := newWire(here)
	const writers, each = 20, 500
	var writing sync.WaitGroup
	for i := range writers {
		writing.Go(func() {
			for n := range each {
				line := fmt.Appendf(nil, "%d %d %s\n", i, n, bytes.Repeat([]byte{byte('a' + i)}, n%50+1))
				if _, err := w.Write(line); err != nil {
					t.Error(err)
				}
				for j := range line {
					line[j] = 0 // it is ours again
				}
			}
		})
	}
	go func() { writing.Wait(); _ = w.Close() }()
	var next [writers]int
	lines := bufio.NewScanner(there)
	for lines.Scan() {
		var i, n int
		var text string
		if _, err := fmt.Sscan(lines.Text(), &i, &n, &text); err != nil || i >= writers {
			t.Fatalf("%q: %v", lines.Text(), err)
		}
		if n != next[i] || text != string(bytes.Repeat([]byte{byte('a' + i)}, n%50+1)) {
			t.Fatalf("writer %d: %q where line %d is next", i, lines.Text(), next[i])
		}
		next[i]++
	}
	for i, n := range next {
		if n != each {
			t.Errorf("of writer %d %d lines have come", i, n)
		}
	}
	if _, err := w.Write([]byte("late")); err == nil {
		t.Error("a write after Close succeeds")
	}
}

// deaf is a server that takes connections and never reads.
func deaf(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var open []net.Conn
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			open = append(open, conn)
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
		for _, conn := range open {
			conn.Close()
		}
	})
	return l
}

// TestWireToADeafPeer: what waits is bounded, and Close is within bounds.
func TestWireToADeafPeer(t *testing.T) {
	conn, err := net.Dial("tcp", deaf(t).Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	w := newWire(conn)
	wrote := make(chan error, 1)
	go func() {
		piece := make([]byte, 64<<10)
		for {
			if _, err := w.Write(piece); err != nil {
				wrote <- err
				return
			}
		}
	}()
	for full := false; !full; time.Sleep(time.Millisecond) {
		w.mu.Lock()
		full = len(w.pending) > maxPending
		if len(w.pending) > maxPending+64<<10 {
			t.Errorf("%d bytes wait", len(w.pending))
		}
		w.mu.Unlock()
	}
	start := time.Now()
	_ = w.Close()
	if took := time.Since(start); took > lastWrite+time.Second {
		t.Errorf("Close took %v", took)
	}
	select {
	case err := <-wrote:
		if err == nil {
			t.Error("the write succeeded")
		}
	case <-time.After(5 * time.Second):
		t.Error("the writer still waits")
	}
	if _, err := io.WriteString(w, "x"); err == nil {
		t.Error("a write after Close succeeds")
	}
}

package rabbit

import (
	"encoding/binary"
	"errors"
	"net"
	"sync"
	"time"
)

// wire is the connection below the AMQP client (Azure/go-amqp 0.17, the version that CloudEvents' binding is made for).
// It does two things that the client does not:
//
// It makes a released outcome a rejected one. The client's Send returns nil for a message that the broker has released,
// that is to say not stored, and keeps the outcome to itself; for a rejected one it returns an error.
//
// It gathers writes: the client writes each frame by itself, a system call a message. Here all that is written while a
// write is under way leaves with the next one.
type wire struct {
	net.Conn
	frames frameReader

	mu      sync.Mutex
	changed *sync.Cond
	pending []byte
	closed  bool
	err     error
	done    chan struct{} // closed when flush has ended

	broken    chan struct{} // closed when nothing more can be read
	breakOnce sync.Once
}

const (
	// maxPending is how many bytes wait for the socket before the writer does.
	maxPending = 1 << 20
	// lastWrite bounds how long Close waits for what is still to be written.
	lastWrite = 2 * time.Second
)

func newWire(conn net.Conn) *wire {
	w := &wire{Conn: conn, done: make(chan struct{}), broken: make(chan struct{})}
	w.changed = sync.NewCond(&w.mu)
	go w.flush()
	return w
}

func (w *wire) Read(p []byte) (int, error) {
	n, err := w.Conn.Read(p)
	if bad := w.frames.read(p[:n]); bad != nil {
		n, err = 0, bad
	}
	if err != nil {
		w.breakOnce.Do(func() { close(w.broken) })
	}
	return n, err
}

func (w *wire) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(w.pending) > maxPending && w.err == nil && !w.closed {
		w.changed.Wait()
	}
	if w.err != nil {
		return 0, w.err
	}
	if w.closed {
		return 0, net.ErrClosed
	}
	w.pending = append(w.pending, p...)
	w.changed.Broadcast()
	return len(p), nil
}

// flush writes what is pending until the wire is closed.
func (w *wire) flush() {
	defer close(w.done)
	var spare []byte
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		for len(w.pending) == 0 && !w.closed {
			w.changed.Wait()
		}
		if len(w.pending) == 0 {
			return
		}
		out := w.pending
		w.pending = spare[:0]
		w.changed.Broadcast()
		w.mu.Unlock()
		_, err := w.Conn.Write(out)
		w.mu.Lock()
		spare = out
		if err != nil {
			w.err = err
			w.changed.Broadcast()
			w.Conn.Close()
			return
		}
	}
}

// SetWriteDeadline does nothing: writes are gathered, and a peer that reads no more is found out by its silence.
func (w *wire) SetWriteDeadline(time.Time) error { return nil }

func (w *wire) Close() error {
	w.mu.Lock()
	w.closed = true
	w.changed.Broadcast()
	w.mu.Unlock()
	_ = w.Conn.SetWriteDeadline(time.Now().Add(lastWrite))
	<-w.done
	return w.Conn.Close()
}

var errFrame = errors.New("AMQP: a disposition that is not understood: it cannot be told whether the broker has the message")

// frameReader follows the stream of frames that comes in, and changes outcomes in place. It keeps its place between
// calls, since a read ends anywhere.
type frameReader struct {
	head [8]byte
	got  int // bytes of head
	left int // bytes of the frame's body still to come
	step step
	skip int // bytes of the current step still to come
	role byte
}

// step is a place in a disposition (AMQP 1.0, part 2, 2.7.6): descriptor, list, role, first, last, settled, state.
type step int

const (
	stepOther step = iota // not in a disposition, or past what matters
	stepDescribed
	stepDescriptor
	stepPerformative
	stepList
	stepRole
	stepFirst
	stepLast
	stepSettled
	stepState
	stepStateDescriptor
	stepOutcome
)

// AMQP's type codes and descriptors, part 1 and 2 of the specification.
const (
	codeDescribed   = 0x00
	codeNull        = 0x40
	codeTrue        = 0x41
	codeFalse       = 0x42
	codeUint0       = 0x43
	codeList0       = 0x45
	codeSmallUint   = 0x52
	codeSmallUlong  = 0x53
	codeBoolean     = 0x56
	codeUint        = 0x70
	codeList8       = 0xc0
	codeList32      = 0xd0
	disposition     = 0x15
	outcomeAccepted = 0x24
	outcomeRejected = 0x25
	outcomeReleased = 0x26
)

func (f *frameReader) read(p []byte) error {
	for i := 0; i < len(p); {
		if f.left == 0 {
			f.head[f.got] = p[i]
			f.got++
			i++
			if f.got < len(f.head) {
				continue
			}
			f.got = 0
			f.step, f.skip = stepOther, 0
			size := binary.BigEndian.Uint32(f.head[:])
			if size == 'A'<<24|'M'<<16|'Q'<<8|'P' || size < uint32(len(f.head)) {
				continue // the protocol's header, of eight bytes too
			}
			f.left = int(size) - len(f.head)
			if f.head[5] == 0 { // an AMQP frame, not one of SASL
				f.step = stepDescribed
				f.skip = int(f.head[4])*4 - len(f.head) // the extended header
			}
			continue
		}
		if f.step == stepOther {
			n := min(f.left, len(p)-i)
			f.left -= n
			i += n
			continue
		}
		if f.skip > 0 {
			f.skip--
		} else if err := f.next(&p[i]); err != nil {
			return err
		}
		f.left--
		i++
	}
	return nil
}

// next takes one byte of a performative.
func (f *frameReader) next(b *byte) error {
	at := f.step
	f.step++
	switch at {
	case stepDescribed:
		if *b != codeDescribed {
			f.step = stepOther
		}
	case stepDescriptor:
		if *b != codeSmallUlong { // RabbitMQ writes no other; one that hid a disposition would hide what became of a message
			return errFrame
		}
	case stepPerformative:
		if *b != disposition {
			f.step = stepOther
		}
	case stepList:
		switch *b {
		case codeList8:
			f.skip = 2
		case codeList32:
			f.skip = 8
		default:
			return errFrame
		}
	case stepRole:
		f.role = *b
		if *b != codeTrue && *b != codeFalse {
			return errFrame
		}
	case stepFirst, stepLast:
		switch *b {
		case codeNull, codeUint0:
		case codeSmallUint:
			f.skip = 1
		case codeUint:
			f.skip = 4
		default:
			return errFrame
		}
		if f.left == 1 { // what follows is left out
			f.step = stepOther
		}
	case stepSettled:
		if *b == codeBoolean {
			f.skip = 1
		}
		if f.left == 1+f.skip && f.role == codeTrue {
			return errFrame // settled without an outcome
		}
	case stepState:
		if *b != codeDescribed {
			if f.role == codeTrue {
				return errFrame
			}
			f.step = stepOther
		}
	case stepStateDescriptor:
		if *b != codeSmallUlong {
			return errFrame
		}
	case stepOutcome:
		f.step = stepOther
		if f.role == codeFalse { // the broker as sender: the state is our own, repeated
			return nil
		}
		switch *b {
		case outcomeAccepted, outcomeRejected:
		case outcomeReleased:
			*b = outcomeRejected
		default:
			return errFrame
		}
	}
	return nil
}

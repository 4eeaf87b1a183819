package source

import (
	"bufio"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"time"
)

const (
	// windowBytes is how many bytes of messages that are not settled each connection holds, and one message more: 16 MiB
	// for all, as they stand in the inbox too, leave room below 64 MiB for batches on their way and for garbage.
	windowBytes = 16 << 20 / connections
	// fewAcks is how many acknowledgements are worth a frame each.
	fewAcks = 16
)

// window is the connection below the AMQP 0.9.1 client, which takes whatever RabbitMQ sends, and RabbitMQ's prefetch counts
// messages only: 2,048 of the largest would be 32 GiB. It follows the frames just far enough to know which delivery takes
// how many bytes, and reads no further while those that are not settled take too many. RabbitMQ closes a connection that
// is not read for long; the next one asks for fewer messages at once.
//
// It has no deadlines that the client could set: it would set one for each frame.
type window struct {
	conn net.Conn
	in   *bufio.Reader // the client's own is of 4 KiB, a system call for a dozen messages

	// For the reader only.
	head [11]byte // of a frame, and the method if it is one
	got  int      // bytes of head
	left int      // bytes of the frame still to come

	mu      sync.Mutex
	changed *sync.Cond
	most    int         // the prefetch
	first   uint64      // the delivery of open[0]: they are numbered from 1 without a gap
	open    []unsettled // from the first that is not settled on
	held    int         // bytes of those that are not settled
	pending int         // settled and not acknowledged
	full    int         // how many it held when there was no room last; 0 if there always was
	opened  bool
	ending  bool
}

type unsettled struct {
	bytes   int
	settled bool
	acked   bool
}

func newWindow(conn net.Conn, most int) *window {
	w := &window{conn: conn, most: most, first: 1}
	w.in = bufio.NewReaderSize(room{w}, 64<<10)
	w.changed = sync.NewCond(&w.mu)
	return w
}

func (w *window) Read(p []byte) (int, error)  { return w.in.Read(p) }
func (w *window) Write(p []byte) (int, error) { return w.conn.Write(p) }

// room reads when there is room.
type room struct{ *window }

// Read waits for room. The last delivery may be incomplete: it must be able to end.
func (w room) Read(p []byte) (int, error) {
	w.mu.Lock()
	for n := len(w.open); n > 1 && w.held-w.open[n-1].bytes > windowBytes; n = len(w.open) {
		if w.ending {
			w.mu.Unlock()
			return 0, io.EOF
		}
		w.full = n
		w.changed.Wait()
	}
	if w.opened && !w.ending {
		_ = w.conn.SetReadDeadline(time.Now().Add(silence))
	}
	w.mu.Unlock()
	n, err := w.conn.Read(p)
	w.follow(p[:n])
	return n, err
}

// watch has the broker taken for dead when it is silent.
func (w *window) watch() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.opened = true
	_ = w.conn.SetWriteDeadline(time.Time{})
	_ = w.conn.SetReadDeadline(time.Now().Add(silence))
}

// end lets the client say goodbye, without waiting for room.
func (w *window) end() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ending = true
	w.changed.Broadcast()
}

// Close lets the broker read what was sent to it: closing a socket on which something waits to be read resets it.
func (w *window) Close() error {
	w.end()
	if half, ok := w.conn.(interface{ CloseWrite() error }); ok && half.CloseWrite() == nil {
		_ = w.conn.SetReadDeadline(time.Now().Add(goodbye))
		_, _ = io.Copy(io.Discard, w.conn)
	}
	return w.conn.Close()
}

// A frame of AMQP 0.9.1: type, channel and size of the payload in 7 bytes, the payload, one byte at its end.
const (
	frameHead    = 7
	frameMethod  = 1
	basicDeliver = 60<<16 | 60 // the class and the method with which a payload begins
)

// follow counts what has been read.
func (w *window) follow(p []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(p) > 0 {
		if w.left == 0 {
			n := copy(w.head[w.got:frameHead], p)
			w.got += n
			p = p[n:]
			if w.got == frameHead {
				w.left = int(binary.BigEndian.Uint32(w.head[3:])) + 1
			}
			continue
		}
		n := min(w.left, len(p))
		if w.head[0] == frameMethod && w.got < len(w.head) {
			n = copy(w.head[w.got:], p[:n])
			if w.got += n; w.got == len(w.head) && binary.BigEndian.Uint32(w.head[frameHead:]) == basicDeliver {
				w.open = append(w.open, unsettled{})
			}
		}
		if last := len(w.open) - 1; last >= 0 && !w.open[last].settled {
			w.open[last].bytes += n
			w.held += n
		}
		p = p[n:]
		if w.left -= n; w.left == 0 {
			w.got = 0
		}
	}
}

// settle says that deliveries are done with. It returns those to be acknowledged, one by one and up to one. Those that
// come after one that is not settled wait for it, if acknowledging them by themselves would be many frames.
func (w *window) settle(at []int64) (singly []uint64, upTo uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, tag := range at {
		d := &w.open[uint64(tag)-w.first]
		d.settled = true
		w.held -= d.bytes
	}
	w.pending += len(at)
	n := 0
	for ; n < len(w.open) && w.open[n].settled; n++ {
		if !w.open[n].acked {
			upTo = w.first + uint64(n)
			w.pending--
		}
	}
	w.open = w.open[n:]
	w.first += uint64(n)
	if w.pending > 0 && (w.pending <= fewAcks || w.pending >= w.most/2) {
		w.pending = 0
		for i := range w.open {
			if d := &w.open[i]; d.settled && !d.acked {
				d.acked = true
				singly = append(singly, w.first+uint64(i))
			}
		}
	}
	w.changed.Broadcast()
	return singly, upTo
}

// fitting is the prefetch for which there would have been room.
func (w *window) fitting() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.full == 0 {
		return w.most
	}
	return max(1, min(w.full, w.most)/2)
}

// Package link receives from one RabbitMQ queue over AMQP 1.0, for a source that settles a message only when it is done
// with it. The client that the CloudEvents SDK is bound to (Azure/go-amqp 0.17) can't: in the one receiver settle mode
// that RabbitMQ knows, it accepts each message as it hands it out. Also here, messages are settled by whole ranges, one
// that can't be decoded is one more message and not the end of the link, and what is held is bounded in bytes too.
package link

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"isobar.dev/internal/rabbit"
)

// Window is how many messages a link holds that are not settled. FrameSize × Window is about the most bytes that they
// have together, whatever was put into the queue.
const (
	Window    = 2048
	FrameSize = 8 << 10
)

const (
	// stepTimeout bounds each step of opening and closing.
	stepTimeout = 5 * time.Second
	// silence is after how long a broker that sends nothing is taken for dead. It is asked to be heard of in half of it.
	silence = 10 * time.Second
	goodbye = time.Second
)

// Link is a connection with one session and one receiving link. Receive is for one goroutine; Accept and Close are for
// any.
type Link struct {
	conn          net.Conn
	in            *bufio.Reader
	frame         []byte        // of the last Receive
	stop          chan struct{} // closed by Close
	ended         chan struct{} // closed when Receive has failed
	close, broken sync.Once

	writing sync.Mutex
	out     []byte

	mu       sync.Mutex
	frames   serial         // transfer frames received, as a sequence number
	messages serial         // messages received, as a sequence number
	settled  int            // messages
	held     int            // frames of messages that are complete and not settled
	large    map[uint32]int // by delivery, the frames of those that took more than one
	granted  struct{ frames, messages serial }
	received int // messages

	partial bytes.Buffer // of a message of several frames
	pieces  int          // frames in it
	id      uint32       // its delivery
}

// serial is a sequence number that wraps around (RFC 1982).
type serial uint32

// The performatives (AMQP 1.0, part 2 and 5).
const (
	performOpen     = 0x10
	performBegin    = 0x11
	performAttach   = 0x12
	performFlow     = 0x13
	performTransfer = 0x14
	performDispose  = 0x15
	performDetach   = 0x16
	performEnd      = 0x17
	performClose    = 0x18
	outcomeAccepted = 0x24
	sourceTerminus  = 0x28
	targetTerminus  = 0x29
	saslMechanisms  = 0x40
	saslInit        = 0x41
	saslOutcome     = 0x44
)

const (
	frameAMQP = 0
	frameSASL = 1
)

// Open connects and attaches to a queue, which must be there. Its error is explained as rabbit.Dial's is.
func Open(ctx context.Context, s rabbit.Settings, queue string) (*Link, error) {
	conn, err := rabbit.Connect(ctx, s)
	if err != nil {
		return nil, s.Explain(err)
	}
	l := &Link{conn: conn, in: bufio.NewReaderSize(conn, 64<<10), stop: make(chan struct{}), ended: make(chan struct{}), large: make(map[uint32]int)}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	_ = conn.SetDeadline(time.Now().Add(stepTimeout))
	heartbeat, err := l.open(s, queue)
	if err != nil {
		conn.Close()
		return nil, s.Explain(err)
	}
	_ = conn.SetDeadline(time.Time{})
	if heartbeat > 0 {
		go l.beat(heartbeat)
	}
	return l, nil
}

func (l *Link) open(s rabbit.Settings, queue string) (heartbeat time.Duration, err error) {
	username, password := s.Login()
	as := fmt.Sprintf("open an AMQP connection to RabbitMQ at %s as user %q", s.Addr, username)
	if err := l.greet(3); err != nil {
		return 0, fmt.Errorf("%s: %w", as, err)
	}
	if _, err := l.expect(saslMechanisms); err != nil {
		return 0, fmt.Errorf("%s: %w", as, err)
	}
	err = l.send(frameSASL, saslInit, 2, func(b []byte) []byte {
		b = appendSymbol(b, "PLAIN")
		return appendBinary(b, []byte("\x00"+username+"\x00"+password))
	})
	if err != nil {
		return 0, fmt.Errorf("%s: %w", as, err)
	}
	outcome, err := l.expect(saslOutcome)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", as, err)
	}
	if outcome[0].uint() != 0 {
		return 0, fmt.Errorf("%s: %w", as, rabbit.ErrRefused)
	}
	if err := l.greet(0); err != nil {
		return 0, fmt.Errorf("%s: %w", as, err)
	}
	err = l.send(frameAMQP, performOpen, 5, func(b []byte) []byte {
		b = appendString(b, "isobar")
		b = appendString(b, "vhost:/")
		b = appendUint(b, FrameSize)
		b = append(b, 0x60, 0, 0) // channel-max, a ushort: one session
		return appendUint(b, uint32(silence/time.Millisecond))
	})
	if err != nil {
		return 0, fmt.Errorf("%s: %w", as, err)
	}
	opened, err := l.expect(performOpen)
	if err != nil {
		return 0, fmt.Errorf("%s: %w", as, err)
	}
	heartbeat = time.Duration(opened[4].uint()) * time.Millisecond / 2

	err = l.send(frameAMQP, performBegin, 4, func(b []byte) []byte {
		b = append(b, codeNull) // remote-channel
		b = appendUint(b, 0)
		b = appendUint(b, Window)
		return appendUint(b, 1)
	})
	if err != nil {
		return 0, fmt.Errorf("open an AMQP session: %w", err)
	}
	begun, err := l.expect(performBegin)
	if err != nil {
		return 0, fmt.Errorf("open an AMQP session: %w", err)
	}
	l.frames = serial(begun[1].uint())

	err = l.send(frameAMQP, performAttach, 7, func(b []byte) []byte {
		b = appendString(b, "isobar-source")
		b = append(b, codeUint0)    // handle
		b = append(b, codeTrue)     // role: receiver
		b = append(b, codeUbyte, 0) // the sender does not settle by itself
		b = append(b, codeUbyte, 0) // the receiver settles at once
		b = appendList(b, sourceTerminus, 1, func(b []byte) []byte { return appendString(b, rabbit.Queue(queue)) })
		return appendList(b, targetTerminus, 0, func(b []byte) []byte { return b })
	})
	if err != nil {
		return 0, fmt.Errorf("open a link to queue %q: %w", queue, err)
	}
	attached, err := l.expect(performAttach)
	if err != nil {
		return 0, fmt.Errorf("open a link to queue %q: %w", queue, err)
	}
	if attached[3].code == codeUbyte && attached[3].uint() == 1 {
		return 0, fmt.Errorf("open a link to queue %q: RabbitMQ would settle messages before they are delivered", queue)
	}
	l.messages = serial(attached[9].uint())
	l.granted.frames, l.granted.messages = l.frames, l.messages
	if err := l.flow(false); err != nil {
		return 0, fmt.Errorf("open a link to queue %q: %w", queue, err)
	}
	return heartbeat, nil
}

// greet exchanges the protocol's header.
func (l *Link) greet(protocol byte) error {
	header := []byte{'A', 'M', 'Q', 'P', protocol, 1, 0, 0}
	if err := l.write(header); err != nil {
		return err
	}
	var answer [8]byte
	if _, err := io.ReadFull(l.in, answer[:]); err != nil {
		return err
	}
	if !bytes.Equal(answer[:], header) {
		return fmt.Errorf("it answers %q and so does not speak AMQP 1.0", answer)
	}
	return nil
}

// expect reads frames until the performative comes, and returns its first fields.
func (l *Link) expect(performative uint64) ([]value, error) {
	for {
		body, err := l.read()
		if err != nil {
			return nil, err
		}
		if len(body) == 0 {
			continue
		}
		r := reader{b: body}
		got, list := r.described()
		fields := make([]value, 10)
		if err := list.fields(fields); err != nil {
			return nil, err
		}
		if got == performative {
			return fields, nil
		}
		if err := l.other(got, list); err != nil {
			return nil, err
		}
	}
}

// read reads the next frame's body, which stays until the next read.
func (l *Link) read() ([]byte, error) {
	var head [8]byte
	if _, err := io.ReadFull(l.in, head[:]); err != nil {
		return nil, err
	}
	size, offset := binary.BigEndian.Uint32(head[:]), int(head[4])*4
	if size < 8 || size > FrameSize || offset < 8 || offset > int(size) {
		return nil, fmt.Errorf("an AMQP frame of %d bytes with its body at %d: %w", size, offset, errValue)
	}
	if cap(l.frame) < FrameSize {
		l.frame = make([]byte, FrameSize)
	}
	l.frame = l.frame[:size-8]
	if _, err := io.ReadFull(l.in, l.frame); err != nil {
		return nil, err
	}
	return l.frame[offset-8:], nil
}

// Buffered reports whether there is more to Receive that has arrived already.
func (l *Link) Buffered() bool { return l.in.Buffered() >= 8 }

// Receive waits for a message and returns its delivery and the encoded message, which stays until the next Receive.
// After an error the link is of no more use, and what is not settled is the queue's again.
func (l *Link) Receive() (delivery uint32, message []byte, err error) {
	if delivery, message, err = l.receive(); err != nil {
		l.broken.Do(func() { close(l.ended) })
	}
	return delivery, message, err
}

func (l *Link) receive() (delivery uint32, message []byte, err error) {
	for {
		if !l.Buffered() {
			_ = l.conn.SetReadDeadline(time.Now().Add(silence))
		}
		body, err := l.read()
		if err != nil {
			return 0, nil, err
		}
		if len(body) == 0 {
			continue
		}
		r := reader{b: body}
		performative, list := r.described()
		if r.err != nil {
			return 0, nil, r.err
		}
		if performative != performTransfer {
			if err := l.other(performative, list); err != nil {
				return 0, nil, err
			}
			continue
		}
		delivery, message, err := l.transfer(list, r.b)
		if err != nil {
			return 0, nil, err
		}
		if err := l.grant(); err != nil {
			return 0, nil, err
		}
		if message != nil {
			return delivery, message, nil
		}
	}
}

// transfer takes one frame of a message, and returns the message when it is whole.
func (l *Link) transfer(list value, payload []byte) (delivery uint32, message []byte, err error) {
	var fields [10]value
	if err := list.fields(fields[:]); err != nil {
		return 0, nil, err
	}
	id, more, aborted := fields[1], fields[5].is(), fields[9].is()
	if l.pieces == 0 {
		if id.null() {
			return 0, nil, errors.New("an AMQP transfer without a delivery-id")
		}
		l.id = uint32(id.uint())
	}
	if more || l.pieces > 0 {
		l.partial.Write(payload)
	}

	l.mu.Lock()
	defer l.mu.Unlock()
	l.pieces++
	l.frames++
	if more {
		return 0, nil, nil
	}
	l.messages++
	l.received++
	if aborted {
		l.settled++
	} else {
		l.held += l.pieces
		if l.pieces > 1 {
			l.large[l.id] = l.pieces
			payload = bytes.Clone(l.partial.Bytes())
			l.partial = bytes.Buffer{}
		}
		message = payload
		if message == nil {
			message = []byte{}
		}
	}
	l.pieces = 0
	return l.id, message, nil
}

// other handles what is no transfer.
func (l *Link) other(performative uint64, list value) error {
	switch performative {
	case performFlow:
		var fields [10]value
		if err := list.fields(fields[:]); err != nil {
			return err
		}
		if fields[9].is() { // echo
			return l.flow(true)
		}
	case performDetach, performEnd, performClose:
		what := map[uint64]string{performDetach: "link", performEnd: "session", performClose: "connection"}[performative]
		return fmt.Errorf("RabbitMQ closed the %s: %s", what, reason(list))
	}
	return nil
}

// reason finds the error in a detach, an end or a close.
func reason(list value) string {
	if list.code == codeList0 || len(list.body) == 0 {
		return "no reason given"
	}
	// The error is the one item that is described.
	skip := 1
	if list.code == codeList32 {
		skip = 4
	}
	r := reader{b: list.body[min(skip, len(list.body)):]}
	for len(r.b) > 0 && r.err == nil {
		if r.b[0] != codeDescribed {
			r.next()
			continue
		}
		_, v := r.described()
		var fields [2]value
		if v.fields(fields[:]) != nil {
			break
		}
		return fmt.Sprintf("%s (%s)", fields[0].text(), fields[1].text())
	}
	return "no reason given"
}

// grant tells the broker what may come, if that is worth a frame.
func (l *Link) grant() error {
	const worth = Window / 4
	l.mu.Lock()
	frames, messages := l.allowed()
	moreFrames, moreMessages := int32(frames-l.granted.frames), int32(messages-l.granted.messages)
	due := moreFrames >= worth || moreMessages >= worth ||
		moreFrames > 0 && l.frames == l.granted.frames || moreMessages > 0 && l.messages == l.granted.messages
	l.mu.Unlock()
	if !due {
		return nil
	}
	return l.flow(false)
}

// allowed is up to where frames and messages may come. A message that has begun must be able to end.
func (l *Link) allowed() (frames, messages serial) {
	window := max(0, Window-l.held)
	if l.pieces > 0 {
		window = max(window, Window/4)
	}
	return l.frames + serial(window), l.messages + serial(max(0, Window-(l.received-l.settled)))
}

// flow tells the broker what may come.
func (l *Link) flow(always bool) error {
	l.writing.Lock() // so that flows leave in the order in which they are made
	defer l.writing.Unlock()
	l.mu.Lock()
	frames, messages := l.allowed()
	// What has been granted is not taken back.
	if int32(frames-l.granted.frames) < 0 {
		frames = l.granted.frames
	}
	if int32(messages-l.granted.messages) < 0 {
		messages = l.granted.messages
	}
	nothing := frames == l.granted.frames && messages == l.granted.messages
	l.granted.frames, l.granted.messages = frames, messages
	received, count := l.frames, l.messages
	l.mu.Unlock()
	if nothing && !always {
		return nil
	}
	l.out = appendFrame(l.out[:0], frameAMQP, performFlow, 7, func(b []byte) []byte {
		b = appendUint(b, uint32(received))
		b = appendUint(b, uint32(frames-received))
		b = appendUint(b, 0)
		b = appendUint(b, 1)
		b = append(b, codeUint0) // handle
		b = appendUint(b, uint32(count))
		return appendUint(b, uint32(messages-count))
	})
	return l.flush()
}

// Range is the deliveries First to Last.
type Range struct{ First, Last uint32 }

// Accept settles deliveries: the broker forgets them. An error says that the link is broken, and that they may come
// again.
func (l *Link) Accept(ranges ...Range) error {
	l.writing.Lock()
	l.out = l.out[:0]
	for _, r := range ranges {
		l.out = appendFrame(l.out, frameAMQP, performDispose, 5, func(b []byte) []byte {
			b = append(b, codeTrue) // role: receiver
			b = appendUint(b, r.First)
			b = appendUint(b, r.Last)
			b = append(b, codeTrue) // settled
			return appendList(b, outcomeAccepted, 0, func(b []byte) []byte { return b })
		})
	}
	err := l.flush()
	l.writing.Unlock()
	if err != nil {
		return err
	}
	l.mu.Lock()
	for _, r := range ranges {
		n := int(r.Last-r.First) + 1
		l.settled += n
		l.held -= n
		if len(l.large) > 0 {
			for id := r.First; id != r.Last+1; id++ {
				if frames, is := l.large[id]; is {
					l.held -= frames - 1
					delete(l.large, id)
				}
			}
		}
	}
	l.mu.Unlock()
	return l.grant()
}

// Close closes the connection; what is not settled goes back into the queue. It ends a Receive, and needs one that is
// under way to hear the broker's goodbye, for which it does not wait long.
func (l *Link) Close() {
	l.close.Do(func() {
		close(l.stop)
		if l.send(frameAMQP, performClose, 0, func(b []byte) []byte { return b }) == nil {
			select {
			case <-l.ended:
			case <-time.After(goodbye):
			}
		}
		l.conn.Close()
	})
}

// beat lets the broker hear of us while there is nothing to say.
func (l *Link) beat(every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-tick.C:
			if l.write([]byte{0, 0, 0, 8, 2, 0, 0, 0}) != nil {
				return
			}
		}
	}
}

func (l *Link) send(kind, performative byte, count int, add func(b []byte) []byte) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.out = appendFrame(l.out[:0], kind, performative, count, add)
	return l.flush()
}

func (l *Link) write(b []byte) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	l.out = append(l.out[:0], b...)
	return l.flush()
}

// flush writes out; a broker that reads nothing for a while is gone.
func (l *Link) flush() error {
	if len(l.out) == 0 {
		return nil
	}
	_ = l.conn.SetWriteDeadline(time.Now().Add(stepTimeout))
	_, err := l.conn.Write(l.out)
	if err != nil {
		l.conn.Close() // half a frame may have gone
	}
	return err
}

func appendFrame(b []byte, kind, performative byte, count int, add func(b []byte) []byte) []byte {
	at := len(b)
	b = append(b, 0, 0, 0, 0, 2, kind, 0, 0)
	b = appendList(b, performative, count, add)
	binary.BigEndian.PutUint32(b[at:], uint32(len(b)-at))
	return b
}

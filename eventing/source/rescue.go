package source

import (
	"context"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/Azure/go-amqp"

	"isobar.dev/events"
	"isobar.dev/internal/rabbit"
)

// mostRescues is how many messages are on their way at once, each with a connection of its own.
const mostRescues = 32

type rescues struct {
	running sync.WaitGroup
	places  chan struct{}
}

// rescue takes the first message of the queue over AMQP 1.0. It returns as soon as that is on its way.
func (r *Rabbit) rescue(ctx context.Context, all *rescues) error {
	select {
	case all.places <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	s := &rescued{done: make(chan struct{})}
	m, err := s.take(ctx, r.settings)
	if err != nil {
		s.leave()
		<-all.places
		return err
	}
	e := Event{from: s}
	if err := readable(m); err != nil {
		e.Unreadable = fmt.Errorf("the AMQP message can't be decoded: %w", err)
		if encoded, err := m.MarshalBinary(); err == nil {
			m.Value, m.Data = nil, [][]byte{encoded}
		}
	}
	e.JSON = events.CarryMessage(nil, m, r.source)
	all.running.Go(func() {
		defer func() { <-all.places }()
		defer s.leave()
		select {
		case <-s.done:
		case <-s.conn.broken:
		case <-ctx.Done():
		}
	})
	r.inbox.force(e)
	return nil
}

// rescued is the stream of one message.
type rescued struct {
	conn   *reluctant
	client *amqp.Client
	left   atomic.Bool
	done   chan struct{} // closed when it is settled
}

func (s *rescued) take(ctx context.Context, settings RabbitSettings) (*amqp.Message, error) {
	ctx, cancel := context.WithTimeout(ctx, connectTimeout)
	defer cancel()
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", settings.Addr)
	if err != nil {
		return nil, err
	}
	s.conn = &reluctant{Conn: conn, broken: make(chan struct{})}
	if s.client, err = amqp.New(s.conn,
		amqp.ConnSASLPlain(settings.Username, settings.Password),
		amqp.ConnServerHostname("vhost:/"),
		amqp.ConnConnectTimeout(connectTimeout),
		amqp.ConnIdleTimeout(silence),
		amqp.ConnContainerID("isobar-source"),
	); err != nil {
		return nil, err
	}
	session, err := s.client.NewSession()
	if err != nil {
		return nil, err
	}
	receiver, err := session.NewReceiver(amqp.LinkSourceAddress(rabbit.Queue(settings.Queue)), amqp.LinkWithManualCredits(), amqp.LinkCredit(1))
	if err != nil {
		return nil, err
	}
	if err := receiver.IssueCredit(1); err != nil {
		return nil, err
	}
	return receiver.Receive(ctx)
}

// leave closes the connection. A message that is not settled goes back into the queue.
func (s *rescued) leave() {
	s.left.Store(true)
	if s.conn == nil {
		return
	}
	select {
	case <-s.done:
	default:
		s.conn.Close()
	}
	if s.client != nil {
		end := time.AfterFunc(goodbye, func() { s.conn.Close() })
		defer end.Stop()
		_ = s.client.Close()
	}
	s.conn.Close()
}

func (s *rescued) takes(int64) bool { return !s.left.Load() }

func (s *rescued) settles([]int64) {
	s.conn.yield()
	close(s.done)
}

// reluctant is the connection below the AMQP 1.0 client (Azure/go-amqp 0.17), which accepts each message as it hands it
// out: its outcome is kept back until the message is settled indeed.
type reluctant struct {
	net.Conn
	broken chan struct{} // closed when nothing more can be read
	once   sync.Once

	mu      sync.Mutex
	outcome []byte
}

func (c *reluctant) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if err != nil {
		c.once.Do(func() { close(c.broken) })
	}
	return n, err
}

// Write is called with one whole frame.
func (c *reluctant) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	const performative, disposition = 8, "\x00\x53\x15" // past the frame's head
	if len(p) > performative+len(disposition) && string(p[performative:][:len(disposition)]) == disposition {
		c.outcome = append(c.outcome, p...)
		return len(p), nil
	}
	return c.Conn.Write(p)
}

func (c *reluctant) yield() {
	c.mu.Lock()
	defer c.mu.Unlock()
	_, _ = c.Conn.Write(c.outcome) // if it is lost, the message comes again
}

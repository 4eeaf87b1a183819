// Package rabbit keeps AMQP 1.0 connections to RabbitMQ 4 or newer: it opens them again when they break, and sends
// with the broker's word that it has what was sent.
package rabbit

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	amqp "github.com/Azure/go-amqp"

	"isobar.dev/internal/peer"
)

// Settings say where RabbitMQ is and how to get in.
type Settings struct {
	Addr     string `env:"RABBITMQ_ADDR,required,notEmpty"` // HOST:PORT
	TLS      bool   `env:"RABBITMQ_TLS"`
	CAFile   string `env:"RABBITMQ_CA_FILE"`  // PEM; the system's authorities without it
	Username string `env:"RABBITMQ_USERNAME"` // guest, with the password guest, without both
	Password string `env:"RABBITMQ_PASSWORD"`
}

// Check returns an error that names the variable that is wrong.
func (s Settings) Check() error {
	if err := peer.CheckAddr(s.Addr); err != nil {
		return fmt.Errorf("RABBITMQ_ADDR must be HOST:PORT: %w", err)
	}
	if (s.Username == "") != (s.Password == "") {
		return errors.New("RABBITMQ_USERNAME and RABBITMQ_PASSWORD must be set together")
	}
	_, err := s.tls().Config()
	return err
}

// Login returns the name and the password to log in with.
func (s Settings) Login() (username, password string) {
	if s.Username == "" && s.Password == "" {
		return "guest", "guest"
	}
	return s.Username, s.Password
}

// Explain returns an error of connecting with what to do about it, where that is known.
func (s Settings) Explain(err error) error {
	if errors.Is(err, ErrRefused) {
		return fmt.Errorf("%w: RABBITMQ_PASSWORD is wrong, or RABBITMQ_USERNAME (RabbitMQ takes guest from its own machine only)", err)
	}
	return s.tls().Explain(err)
}

func (s Settings) tls() peer.TLS {
	return peer.TLS{Peer: "RabbitMQ", Prefix: "RABBITMQ_", On: s.TLS, CAFile: s.CAFile}
}

const (
	// connectTimeout bounds each step of making a connection.
	connectTimeout = 5 * time.Second
	// idleTimeout is after how long a silent broker is taken for dead; it sends heartbeats at half of it.
	idleTimeout = 10 * time.Second
)

// Queue is the AMQP 1.0 address of a queue.
func Queue(name string) string { return "/queues/" + name }

// Conn is a connection.
type Conn struct {
	*amqp.Client
	wire *wire
}

// Connect opens the connection below AMQP. The caller closes it.
func Connect(ctx context.Context, s Settings) (net.Conn, error) {
	conn, err := s.tls().Dial(ctx, s.Addr, connectTimeout)
	if err != nil {
		return nil, fmt.Errorf("connect to RabbitMQ at %s: %w", s.Addr, err)
	}
	return conn, nil
}

// ErrRefused is the error of a login that RabbitMQ does not take.
var ErrRefused = errors.New("RabbitMQ refuses the user or the password")

// Dial opens a connection. The caller closes it. Its error is explained.
func Dial(ctx context.Context, s Settings) (*Conn, error) {
	conn, err := dial(ctx, s)
	return conn, s.Explain(err)
}

func dial(ctx context.Context, s Settings) (*Conn, error) {
	username, password := s.Login()
	conn, err := Connect(ctx, s)
	if err != nil {
		return nil, err
	}
	w := newWire(conn)
	defer context.AfterFunc(ctx, func() { conn.Close() })() // the client knows no context
	client, err := amqp.New(w,
		amqp.ConnSASLPlain(username, password),
		amqp.ConnServerHostname("vhost:/"),
		amqp.ConnConnectTimeout(connectTimeout),
		amqp.ConnIdleTimeout(idleTimeout),
		amqp.ConnMaxFrameSize(256<<10),
		amqp.ConnContainerID("isobar"),
	)
	if err != nil {
		_ = w.Close()
		if strings.HasPrefix(err.Error(), "SASL PLAIN auth failed") { // the client has no other word for it
			err = ErrRefused
		}
		return nil, fmt.Errorf("open an AMQP connection to RabbitMQ at %s as user %q: %w", s.Addr, username, err)
	}
	return &Conn{client, w}, nil
}

// Broken is closed when the connection has broken.
func (c *Conn) Broken() <-chan struct{} { return c.wire.broken }

// Close closes the connection, within a few seconds even if the broker does not answer.
func (c *Conn) Close() {
	closed := make(chan struct{})
	go func() {
		_ = c.Client.Close() // the error is why it broke, which was said before
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(lastWrite):
	}
	_ = c.wire.Close()
	<-closed
}

// ErrAway is the error of Send while there is no connection.
var ErrAway = errors.New("RabbitMQ is away")

// ErrNotStored is the error of Send for a message that the broker has rejected or released: a full queue, a queue
// without its leader, no queue at all.
var ErrNotStored = errors.New("RabbitMQ has not stored the message")

const (
	// senderLinks share the work; each has a session of its own, since RabbitMQ serves a session by one process.
	senderLinks = 4
	// linkWorkers is how many messages are in flight on one link; RabbitMQ grants that many credits and more.
	linkWorkers = 128
	// stall is after how long without a single outcome a link is given up although the connection lives.
	stall = 5 * time.Second
)

// Sender sends to one queue over several links of one connection, each with many messages in flight. Its methods may
// be called at the same time.
type Sender struct {
	settings Settings
	queue    string
	address  string
	jobs     chan job
	link     *peer.Link[<-chan struct{}] // of a channel that is closed when the connection is gone
}

type job struct {
	ctx     context.Context
	message *amqp.Message
	all     *outcome
}

// outcome gathers what became of the messages of one Send.
type outcome struct {
	sync.WaitGroup
	mu  sync.Mutex
	err error
}

func (o *outcome) fail(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.err == nil {
		o.err = err
	}
}

// NewSender returns a Sender, which connects by itself and stays connected until Close.
func NewSender(s Settings, queue string) *Sender { return newSender(s, queue, Queue(queue)) }

func newSender(s Settings, queue, address string) *Sender {
	sender := &Sender{settings: s, queue: queue, address: address, jobs: make(chan job)}
	sender.link = peer.NewLink("RabbitMQ queue "+queue, sender.use)
	return sender
}

// Send returns nil when the broker has stored every message, and an error if that is not certain of one: ErrAway at
// once while there is no connection (but for the very first, which is waited for), ErrNotStored when the broker has said
// so, or ctx's. ctx must have a deadline: it is what bounds the wait for the broker.
func (s *Sender) Send(ctx context.Context, messages ...*amqp.Message) error {
	gone, err := s.link.Get(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrAway, err)
	}
	var all outcome
	for _, m := range messages {
		all.Add(1)
		select {
		case s.jobs <- job{ctx, m, &all}:
			continue
		case <-ctx.Done():
			all.fail(ctx.Err())
		case <-gone:
			all.fail(ErrAway)
		}
		all.Done()
		break
	}
	all.Wait()
	if all.err != nil {
		return fmt.Errorf("publish to queue %q: %w", s.queue, all.err)
	}
	return nil
}

// Err returns nil while there is a connection, or why there is none.
func (s *Sender) Err() error { return s.link.Err() }

// Close ends the connection and everything that is under way on it.
func (s *Sender) Close() { s.link.Close() }

// use opens a connection and sends over it until it breaks or ctx ends.
func (s *Sender) use(ctx context.Context, up func(<-chan struct{})) error {
	conn, err := Dial(ctx, s.settings)
	if err != nil {
		return err
	}
	var workers sync.WaitGroup
	defer workers.Wait()
	defer conn.Close() // ends what the workers wait for
	defer context.AfterFunc(ctx, conn.Close)()
	links := make([]*amqp.Sender, senderLinks)
	for i := range links {
		if links[i], err = s.open(conn); err != nil {
			return err
		}
	}

	gone := make(chan struct{})
	defer close(gone)
	broken := make(chan error, 1)
	for _, link := range links {
		settled := new(atomic.Int64)
		for range linkWorkers {
			workers.Go(func() { s.work(link, settled, gone, broken) })
		}
	}
	up(gone)

	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-conn.Broken():
		return errors.New("the connection is broken")
	case err := <-broken:
		return err
	}
}

func (s *Sender) open(conn *Conn) (*amqp.Sender, error) {
	session, err := conn.NewSession()
	if err != nil {
		return nil, fmt.Errorf("open an AMQP session: %w", err)
	}
	link, err := session.NewSender(
		amqp.LinkTargetAddress(s.address),
		amqp.LinkSenderSettle(amqp.ModeUnsettled),
		amqp.LinkDetachOnDispositionError(false),
	)
	if err != nil {
		return nil, fmt.Errorf("open a link to queue %q: %w", s.queue, err)
	}
	return link, nil
}

// work sends one message after the other; many workers share a link and the time of its last outcome.
func (s *Sender) work(link *amqp.Sender, settled *atomic.Int64, gone <-chan struct{}, broken chan<- error) {
	give := func(err error) {
		select {
		case broken <- err:
		default: // another has given the link up already
		}
	}
	for {
		select {
		case <-gone:
			return
		case j := <-s.jobs:
			start := time.Now()
			err := link.Send(j.ctx, j.message)
			rejection, rejected := errors.AsType[*amqp.Error](err)
			if err == nil || rejected {
				settled.Store(time.Now().UnixNano())
			}
			switch {
			case err == nil:
			case rejected && rejection == nil:
				err = ErrNotStored
			case rejected:
				err = fmt.Errorf("%w: %w", ErrNotStored, err)
			case j.ctx.Err() == nil:
				give(err)
			case time.Since(start) > stall && time.Since(time.Unix(0, settled.Load())) > stall:
				give(fmt.Errorf("no outcome for %v", stall))
			}
			if err != nil {
				j.all.fail(err)
			}
			j.all.Done()
		}
	}
}

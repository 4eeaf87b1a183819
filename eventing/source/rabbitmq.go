package source

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"

	amqp "github.com/Azure/go-amqp"
	"github.com/cloudevents/sdk-go/v2/event"
	amqp091 "github.com/rabbitmq/amqp091-go"

	"isobar.dev/events"
	"isobar.dev/internal/rabbit"
)

// RabbitSettings say which queue is read and where its dead letters go.
type RabbitSettings struct {
	rabbit.Settings
	Queue     string `env:"RABBITMQ_QUEUE" envDefault:"message"`
	DeadQueue string `env:"RABBITMQ_DEAD_QUEUE" envDefault:"message.dead"`
}

const (
	// connections is how many share the work: RabbitMQ serves each by processes of its own. A second one brings a third
	// more here, with less CPU per message.
	connections = 2
	// prefetch is how many messages RabbitMQ sends on each ahead of their settlement. See [window] for the limit in bytes.
	prefetch = 2048
)

// Rabbit is the Source of a RabbitMQ queue. A message that is no CloudEvent has its message-id as its id, under the
// source /rabbitmq/QUEUE.
type Rabbit struct {
	settings RabbitSettings
	source   string
	inbox    *inbox
	state    atomic.Value // a string

	mu   sync.Mutex
	dead *rabbit.Sender // nil until there are dead letters
}

var _ Source = (*Rabbit)(nil)

// NewRabbit returns the Source of a queue.
func NewRabbit(s RabbitSettings) *Rabbit {
	r := &Rabbit{settings: s, source: "/rabbitmq/" + s.Queue, inbox: newInbox()}
	r.state.Store("not connected yet")
	return r
}

// Run is that of [Source].
func (r *Rabbit) Run(ctx context.Context) {
	rabbit.Keep(ctx, "RabbitMQ queue "+r.settings.Queue, func(ctx context.Context, up func()) error {
		err := r.use(ctx, up)
		r.state.Store(fmt.Sprint(err))
		return err
	})
}

// use consumes over several connections until one is broken.
func (r *Rabbit) use(ctx context.Context, up func()) error {
	all := rescues{places: make(chan struct{}, mostRescues)}
	defer all.running.Wait()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var first sync.Once
	var consumers sync.WaitGroup
	for range connections {
		consumers.Go(func() { cancel(r.keep(ctx, func() { first.Do(up) }, &all)) })
	}
	consumers.Wait()
	return context.Cause(ctx)
}

// keep consumes over one connection until it is broken. A message that AMQP 0.9.1 can't carry breaks it each time, so
// then it goes on one by one until the message is the queue's first, and rescues it.
func (r *Rabbit) keep(ctx context.Context, up func(), all *rescues) error {
	most := prefetch
	for {
		next, err := r.consume(ctx, most, up)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err == nil:
		case !unfit(err):
			if next >= most {
				return err
			}
			slog.Warn("large messages: RabbitMQ is to send fewer at once", "queue", r.settings.Queue, "prefetch", next, "error", err)
		case most > 1:
			next = 1
		default:
			slog.Warn("a message does not fit AMQP 0.9.1: taking it over AMQP 1.0", "queue", r.settings.Queue, "error", err)
			if err := r.rescue(ctx, all); err != nil {
				return fmt.Errorf("take a message over AMQP 1.0 from queue %q: %w", r.settings.Queue, err)
			}
			next = prefetch
		}
		most = next
	}
}

// consume receives with that prefetch until the connection breaks or, with less than the usual one, until enough have
// come to try that again. It returns the prefetch to go on with.
func (r *Rabbit) consume(ctx context.Context, most int, up func()) (next int, err error) {
	d := new(deliveries)
	defer d.close()
	if err := d.open(ctx, r.settings.Settings, most); err != nil {
		return most, err
	}
	closed := d.channel.NotifyClose(make(chan *amqp091.Error, 1))
	canceled := d.channel.NotifyCancel(make(chan string, 1))
	arriving, err := d.channel.Consume(r.settings.Queue, "isobar-source", false, false, false, false, nil)
	if err != nil {
		return most, fmt.Errorf("consume queue %q: %w", r.settings.Queue, err)
	}
	up()
	r.state.Store("connected")
	passed := make(chan struct{})
	var receiver sync.WaitGroup
	defer receiver.Wait()
	defer d.close()
	receiver.Go(func() { r.receive(d, arriving, most < prefetch, passed) })
	select {
	case <-ctx.Done():
		return most, ctx.Err()
	case <-passed:
		return prefetch, nil
	case <-canceled:
		return most, fmt.Errorf("receive from queue %q: RabbitMQ has canceled the consumer", r.settings.Queue)
	case reason := <-closed:
		if reason == nil {
			reason = amqp091.ErrClosed
		}
		return d.window.fitting(), fmt.Errorf("receive from queue %q: %w", r.settings.Queue, reason)
	}
}

// unfit reports whether it is a message that may have broken the connection: RabbitMQ 4 fails when a message sent over
// AMQP 1.0 has no form in AMQP 0.9.1 (a UUID among its application properties or annotations, a content type of more
// than 255 bytes), and the client fails when its headers are larger than a frame.
func unfit(err error) bool {
	var e *amqp091.Error
	if !errors.As(err, &e) {
		return false
	}
	if e.Server {
		return e.Code == amqp091.InternalError
	}
	for _, broken := range []error{amqp091.ErrSyntax, amqp091.ErrFrame, amqp091.ErrFrameTooLarge} {
		if e.Reason == broken.Error() {
			return true
		}
	}
	return false
}

// receive puts what arrives into the inbox, which needs no limit of its own: the window is one. If it is for a while
// only, it closes passed when that has passed.
func (r *Rabbit) receive(d *deliveries, arriving <-chan amqp091.Delivery, while bool, passed chan<- struct{}) {
	n := 0
	arrived := make([]Event, 0, together)
	for m := range arriving {
		for more := true; more; {
			e := r.read(&m)
			e.from, e.at = d, int64(m.DeliveryTag)
			arrived = append(arrived, e)
			if more = len(arrived) < together; more {
				select {
				case m, more = <-arriving:
				default:
					more = false
				}
			}
		}
		r.inbox.force(arrived...)
		n += len(arrived)
		if while && n >= prefetch {
			while = false
			close(passed)
		}
		clear(arrived)
		arrived = arrived[:0]
	}
}

// read makes the event of a delivery, whose body it may keep.
func (r *Rabbit) read(d *amqp091.Delivery) Event {
	if d.ContentType == event.ApplicationCloudEventsJSON && d.Type != encodedBody {
		if data, ok := events.CarryStructured(d.Body[:0], d.Body); ok { // it is itself
			return Event{JSON: data}
		}
	}
	m := &amqp.Message{Properties: &amqp.MessageProperties{}, ApplicationProperties: map[string]any(d.Headers), Data: [][]byte{d.Body}}
	if d.ContentType != "" {
		m.Properties.ContentType = &d.ContentType
	}
	if d.MessageId != "" {
		m.Properties.MessageID = d.MessageId
	} else {
		m.Properties.MessageID = d.Headers[longMessageID]
	}
	var unreadable error
	// The body of a message of that type is encoded, unless a publisher has named the type for reasons of its own.
	if d.Type == encodedBody && len(d.Body) > 0 && d.Body[0] == 0 {
		if value, err := decode(d.Body); err == nil {
			m.Value, m.Data = value.Value, value.Data
		} else {
			unreadable = fmt.Errorf("the AMQP message can't be decoded: %w", err)
		}
	}
	return Event{JSON: events.CarryMessage(nil, m, r.source), Unreadable: unreadable}
}

// What RabbitMQ says of a message sent over AMQP 1.0 that does not fit AMQP 0.9.1: that the body is still encoded, as
// it is no data; and a message-id that is binary or of more than 255 bytes.
const (
	encodedBody   = "amqp-1.0"
	longMessageID = "x-message-id"
)

// decode decodes a body that should be bytes or text, and survives the decoder.
func decode(body []byte) (m amqp.Message, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the decoder fails: %v", p)
		}
	}()
	if err := m.UnmarshalBinary(slices.Clone(body)); err != nil {
		return m, err
	}
	return m, readable(&m)
}

func readable(m *amqp.Message) error {
	switch m.Value.(type) {
	case nil, string, []byte:
		return nil
	}
	return fmt.Errorf("its body is an AMQP value of type %T", m.Value)
}

// Take is that of [Source].
func (r *Rabbit) Take(ctx context.Context, least, most int) []Event { return r.inbox.take(ctx, least, most) }

// Settle is that of [Source].
func (r *Rabbit) Settle(done []Event) { settle(done) }

// Bury is that of [Source].
func (r *Rabbit) Bury(ctx context.Context, dead []event.Event) error {
	r.mu.Lock()
	if r.dead == nil {
		r.dead = rabbit.NewSender(r.settings.Settings, r.settings.DeadQueue)
	}
	sender := r.dead
	r.mu.Unlock()
	messages := make([]*amqp.Message, len(dead))
	for i := range dead {
		messages[i] = events.WriteMessage(&dead[i])
	}
	return sender.Send(ctx, messages...)
}

// State is that of [Source].
func (r *Rabbit) State() string { return r.state.Load().(string) }

// Close is that of [Source].
func (r *Rabbit) Close() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.dead != nil {
		r.dead.Close()
	}
}

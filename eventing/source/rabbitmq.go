package source

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	amqp "github.com/Azure/go-amqp"
	"github.com/cloudevents/sdk-go/v2/event"

	"isobar.dev/eventing/source/link"
	"isobar.dev/events"
	"isobar.dev/internal/peer"
	"isobar.dev/internal/rabbit"
)

// RabbitSettings say which queue is read and where its dead letters go.
type RabbitSettings struct {
	rabbit.Settings
	Queue     string `env:"RABBITMQ_QUEUE" envDefault:"message"`
	DeadQueue string `env:"RABBITMQ_DEAD_QUEUE" envDefault:"message.dead"`
}

// links is how many share the work, each a connection of its own: RabbitMQ serves each by a process of its own.
const links = 2

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

// NewRabbit returns the Source of a queue. Its error names the variable that is wrong.
func NewRabbit(s RabbitSettings) (*Rabbit, error) {
	r := &Rabbit{settings: s, source: "/rabbitmq/" + s.Queue, inbox: newInbox()}
	r.state.Store(notYet)
	return r, s.Check()
}

// Run is that of [Source].
func (r *Rabbit) Run(ctx context.Context) {
	peer.Keep(ctx, "RabbitMQ queue "+r.settings.Queue, func(ctx context.Context, up func()) error {
		err := r.use(ctx, up)
		r.state.Store(fmt.Sprint(err))
		return err
	})
}

func (r *Rabbit) use(ctx context.Context, up func()) error {
	var receivers sync.WaitGroup
	defer receivers.Wait()
	broken := make(chan error, links)
	for range links {
		l, err := link.Open(ctx, r.settings.Settings, r.settings.Queue)
		if err != nil {
			return err
		}
		d := &deliveries{link: l}
		defer d.close()
		receivers.Go(func() { broken <- r.receive(d) })
	}
	up()
	r.state.Store("connected")
	select {
	case <-ctx.Done():
		return ctx.Err()
	case err := <-broken:
		return fmt.Errorf("receive from queue %q: %w", r.settings.Queue, err)
	}
}

// receive puts what arrives into the inbox. It needs no limit of its own: the link's window is one.
func (r *Rabbit) receive(d *deliveries) error {
	var arrived []Event
	for {
		id, message, err := d.link.Receive()
		if err != nil {
			return err
		}
		e := r.read(message)
		e.from, e.at = d, int64(id)
		arrived = append(arrived, e)
		if len(arrived) >= together || !d.link.Buffered() {
			r.inbox.force(arrived...)
			clear(arrived)
			arrived = arrived[:0]
		}
	}
}

// read makes the event of an encoded message, which it does not keep.
func (r *Rabbit) read(message []byte) Event {
	sections, err := link.Split(message)
	if err == nil && sections.Body && string(sections.ContentType) == event.ApplicationCloudEventsJSON {
		if data, ok := events.CarryStructured(make([]byte, 0, len(sections.Data)), sections.Data); ok {
			return Event{JSON: data}
		}
	}
	m := new(amqp.Message)
	if err := decode(m, slices.Clone(message)); err != nil {
		// It is kept as it came: what can't be read can't be taken apart.
		whole := &amqp.Message{Data: [][]byte{slices.Clone(message)}}
		if sections.ID != "" {
			whole.Properties = &amqp.MessageProperties{MessageID: sections.ID}
		}
		return Event{
			JSON:       events.CarryMessage(nil, whole, r.source),
			Unreadable: fmt.Errorf("the AMQP message can't be decoded: %w", err),
		}
	}
	return Event{JSON: events.CarryMessage(nil, m, r.source)}
}

// decode decodes a message whose body is bytes or text, and survives the decoder.
func decode(m *amqp.Message, data []byte) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("the decoder fails: %v", p)
		}
	}()
	if err := m.UnmarshalBinary(data); err != nil {
		return err
	}
	switch m.Value.(type) {
	case nil, string, []byte:
		return nil
	}
	return fmt.Errorf("its body is an AMQP value of type %T", m.Value)
}

// Take is that of [Source].
func (r *Rabbit) Take(ctx context.Context, least, most int) []Event {
	return r.inbox.take(ctx, least, most)
}

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

// deliveries is the stream of one link.
type deliveries struct {
	link   *link.Link
	closed atomic.Bool
}

func (d *deliveries) close() {
	d.closed.Store(true)
	d.link.Close()
}

func (d *deliveries) takes(int64) bool { return !d.closed.Load() }

func (d *deliveries) settles(at []int64) {
	slices.Sort(at)
	var ranges []link.Range
	for _, id := range at {
		id := uint32(id)
		if n := len(ranges); n > 0 && ranges[n-1].Last+1 == id {
			ranges[n-1].Last = id
			continue
		}
		ranges = append(ranges, link.Range{First: id, Last: id})
	}
	if err := d.link.Accept(ranges...); err != nil {
		d.close() // they come again over another link
	}
}

package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/IBM/sarama"
	"github.com/cloudevents/sdk-go/v2/event"

	"isobar.dev/events"
	"isobar.dev/internal/kafka"
	"isobar.dev/internal/peer"
)

// KafkaSettings say which topic is read, as which group, and where its dead letters go.
type KafkaSettings struct {
	kafka.Settings
	Topic     string `env:"KAFKA_TOPIC" envDefault:"message"`
	DeadTopic string `env:"KAFKA_DEAD_TOPIC" envDefault:"message.dead"`
	GroupID   string `env:"KAFKA_GROUP_ID" envDefault:"isobar-redis-writer"`
	// InstanceID makes the membership static: who comes with the same one takes over a killed one's partitions at once.
	InstanceID string `env:"KAFKA_GROUP_INSTANCE_ID"`
}

const (
	// sessionTimeout is after how long a member that is not heard of loses its partitions; Kafka allows no less than 6 s
	// by default.
	sessionTimeout = 6 * time.Second
	commitInterval = 500 * time.Millisecond
	// incarnationCheck is how often it is asked whether the topic is still the same one.
	incarnationCheck = 5 * time.Second
	// handover bounds how long a partition that is taken away waits for its POSTs under way.
	handover = 5 * time.Second
)

// Kafka is the Source of a Kafka topic, as a member of a consumer group. A record that is no CloudEvent has its place
// as its id (partition:P/offset:O), under the source /kafka/TOPIC/ID with the topic's own id: a topic that was deleted
// and created again, or one of that name elsewhere, is another source. Offsets are committed with that id, so that
// those of a deleted topic are not taken for its successor's.
type Kafka struct {
	settings KafkaSettings
	inbox    *inbox
	state    atomic.Value // a string

	mu   sync.Mutex
	dead *kafka.Sender // nil until there are dead letters
}

var _ Source = (*Kafka)(nil)

// NewKafka returns the Source of a topic. Its error names the variable that is wrong.
func NewKafka(s KafkaSettings) (*Kafka, error) {
	k := &Kafka{settings: s, inbox: newInbox()}
	k.state.Store(notYet)
	_, err := k.config()
	return k, err
}

func (k *Kafka) config() (*sarama.Config, error) {
	c, err := k.settings.Config()
	if err != nil {
		return nil, err
	}
	c.Metadata.Retry.Max = 3
	c.Consumer.Group.InstanceId = k.settings.InstanceID
	c.Consumer.Group.Session.Timeout = sessionTimeout
	c.Consumer.Group.Heartbeat.Interval = sessionTimeout / 3
	c.Consumer.Group.Rebalance.Timeout = 4 * handover
	c.Consumer.Group.Rebalance.Retry.Backoff = 250 * time.Millisecond
	c.Consumer.Offsets.Initial = sarama.OffsetOldest
	c.Consumer.Offsets.AutoCommit.Interval = commitInterval
	c.Consumer.IsolationLevel = sarama.ReadCommitted
	// What is fetched at once is held until it is delivered, and as records it takes several times its bytes.
	c.Consumer.Fetch.Default = 256 << 10
	c.Consumer.Fetch.MaxBytes = 2 << 20
	c.ChannelBufferSize = together
	c.Consumer.MaxProcessingTime = time.Second
	c.Consumer.Retry.Backoff = 500 * time.Millisecond
	return c, nil
}

// Run is that of [Source].
func (k *Kafka) Run(ctx context.Context) {
	peer.Keep(ctx, "Kafka topic "+k.settings.Topic, func(ctx context.Context, up func()) error {
		err := k.settings.Explain(k.use(ctx, up))
		k.state.Store(fmt.Sprint(err))
		return err
	})
}

func (k *Kafka) use(ctx context.Context, up func()) error {
	config, err := k.config()
	if err != nil {
		return err
	}
	client, err := sarama.NewClient(k.settings.Brokers, config)
	if err != nil {
		return fmt.Errorf("connect to Kafka at %v: %w", k.settings.Brokers, err)
	}
	defer dismiss(client)
	group, err := sarama.NewConsumerGroupFromClient(k.settings.GroupID, client)
	if err != nil {
		return fmt.Errorf("join consumer group %q: %w", k.settings.GroupID, err)
	}
	defer dismiss(group)
	for ctx.Err() == nil {
		began := time.Now()
		session, cancel := context.WithCancel(ctx)
		err := group.Consume(session, []string{k.settings.Topic}, &member{kafka: k, client: client, up: up, leave: cancel})
		cancel()
		if err != nil {
			return fmt.Errorf("consume topic %q as group %q: %w", k.settings.Topic, k.settings.GroupID, err)
		}
		if time.Since(began) < time.Second && ctx.Err() == nil {
			return fmt.Errorf("consume topic %q as group %q: the session ended at once", k.settings.Topic, k.settings.GroupID)
		}
	}
	return ctx.Err()
}

// dismiss closes what is of no more use: that it can't say goodbye to a broker that is away is no news.
func dismiss(c io.Closer) { _ = c.Close() }

// Take is that of [Source].
func (k *Kafka) Take(ctx context.Context, least, most int) []Event {
	return k.inbox.take(ctx, least, most)
}

// Settle is that of [Source].
func (k *Kafka) Settle(done []Event) { settle(done) }

// Bury is that of [Source]. One call at a time sends: together they may be more than Kafka takes at once.
func (k *Kafka) Bury(ctx context.Context, dead []event.Event) error {
	records, err := events.WriteRecords(dead, k.settings.DeadTopic)
	if err != nil {
		return err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dead == nil {
		sender, err := kafka.NewSender(k.settings.Settings, k.settings.DeadTopic, kafka.DeadLetters)
		if err != nil {
			return err
		}
		k.dead = sender
	}
	return k.dead.Send(ctx, records...)
}

// State is that of [Source].
func (k *Kafka) State() string { return k.state.Load().(string) }

// Close is that of [Source].
func (k *Kafka) Close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.dead != nil {
		k.dead.Close()
	}
}

// member is this process in the group, for one session.
type member struct {
	kafka  *Kafka
	client sarama.Client
	up     func()
	leave  context.CancelFunc

	topicID string
	changed atomic.Bool // the topic is not the one of topicID any more
}

// Setup sets back the offsets that were committed for a topic of the same name that is gone.
func (m *member) Setup(session sarama.ConsumerGroupSession) error {
	topic := m.kafka.settings.Topic
	id, err := m.askTopicID()
	if err != nil {
		return fmt.Errorf("ask for the id of topic %q: %w", topic, err)
	}
	m.topicID = id
	if partitions := session.Claims()[topic]; len(partitions) > 0 {
		coordinator, err := m.client.Coordinator(m.kafka.settings.GroupID)
		if err != nil {
			return fmt.Errorf("find the coordinator of group %q: %w", m.kafka.settings.GroupID, err)
		}
		committed, err := coordinator.FetchOffset(sarama.NewOffsetFetchRequest(m.client.Config().Version,
			m.kafka.settings.GroupID, map[string][]int32{topic: partitions}))
		if err != nil {
			return fmt.Errorf("fetch the offsets of group %q: %w", m.kafka.settings.GroupID, err)
		}
		for _, partition := range partitions {
			block := committed.GetBlock(topic, partition)
			if block == nil || block.Metadata == "" || block.Metadata == id {
				continue
			}
			oldest, err := m.client.GetOffset(topic, partition, sarama.OffsetOldest)
			if err != nil {
				return fmt.Errorf("ask for the oldest offset of topic %q: %w", topic, err)
			}
			session.ResetOffset(topic, partition, oldest, id)
		}
	}
	m.up()
	m.kafka.state.Store(fmt.Sprintf("connected, %d partitions", len(session.Claims()[topic])))
	go m.watch(session.Context())
	return nil
}

func (m *member) Cleanup(sarama.ConsumerGroupSession) error { return nil }

// watch ends the session when the topic is gone or another one: the client itself goes by its name.
func (m *member) watch(ctx context.Context) {
	tick := time.NewTicker(incarnationCheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		id, err := m.askTopicID()
		if errors.Is(err, sarama.ErrUnknownTopicOrPartition) || err == nil && id != m.topicID {
			m.changed.Store(true)
			m.leave()
			return
		}
	}
}

func (m *member) askTopicID() (string, error) {
	broker := m.client.LeastLoadedBroker()
	if broker == nil {
		return "", sarama.ErrBrokerNotAvailable
	}
	request := sarama.NewMetadataRequest(m.client.Config().Version, []string{m.kafka.settings.Topic})
	response, err := broker.GetMetadata(request)
	if err != nil {
		return "", err
	}
	for _, topic := range response.Topics {
		if topic.Name == m.kafka.settings.Topic {
			if topic.Err != sarama.ErrNoError {
				return "", topic.Err
			}
			return topic.Uuid.String(), nil
		}
	}
	return "", sarama.ErrUnknownTopicOrPartition
}

// ConsumeClaim puts a partition's records into the inbox until the partition is taken away.
func (m *member) ConsumeClaim(session sarama.ConsumerGroupSession, claim sarama.ConsumerGroupClaim) error {
	p := &partition{member: m, session: session, id: claim.Partition(), idle: make(chan struct{})}
	defer p.release()
	source := "/kafka/" + m.kafka.settings.Topic + "/" + m.topicID
	arrived := make([]Event, 0, together)
	for {
		select {
		case <-session.Context().Done():
			return nil
		case record, ok := <-claim.Messages():
			if !ok {
				return nil
			}
			buf := make([]byte, 0, 384*(len(claim.Messages())+1))
			for more := true; more && record != nil; {
				start := len(buf)
				buf = events.CarryRecord(buf, record, source)
				arrived = append(arrived, Event{JSON: buf[start:len(buf):len(buf)], from: p, at: p.arrives(record.Offset)})
				record = nil
				if more = len(arrived) < together; more {
					select {
					case record = <-claim.Messages():
					default:
					}
				}
			}
			m.kafka.inbox.put(session.Context().Done(), arrived...)
			clear(arrived)
			arrived = arrived[:0]
		}
	}
}

// partition is the stream of one partition while it is assigned. What is committed is the offset up to which all
// records are settled.
type partition struct {
	member  *member
	session sarama.ConsumerGroupSession
	id      int32

	mu       sync.Mutex
	offsets  []offset // from the first that is not settled on
	first    int64    // position of offsets[0]
	under    int      // handed out and not settled
	revoked  bool     // nothing is handed out any more
	released bool     // nothing is committed any more
	idle     chan struct{}
}

type offset struct {
	of      int64
	settled bool
}

// arrives returns the position of a record: positions have no gaps, as offsets may.
func (p *partition) arrives(of int64) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.offsets = append(p.offsets, offset{of: of})
	return p.first + int64(len(p.offsets)) - 1
}

func (p *partition) takes(int64) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.revoked {
		p.under++
	}
	return !p.revoked
}

func (p *partition) settles(at []int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.released {
		return
	}
	for _, position := range at {
		p.offsets[position-p.first].settled = true
	}
	n := 0
	for n < len(p.offsets) && p.offsets[n].settled {
		n++
	}
	if n > 0 && !p.member.changed.Load() {
		p.session.MarkOffset(p.member.kafka.settings.Topic, p.id, p.offsets[n-1].of+1, p.member.topicID)
	}
	p.offsets = p.offsets[n:]
	p.first += int64(n)
	if p.under -= len(at); p.under == 0 && p.revoked {
		close(p.idle)
	}
}

// release stops handing out and waits for what is under way.
func (p *partition) release() {
	p.mu.Lock()
	p.revoked = true
	waiting := p.under > 0
	p.mu.Unlock()
	if waiting {
		select {
		case <-p.idle:
		case <-time.After(handover):
		}
	}
	p.mu.Lock()
	p.released = true
	p.mu.Unlock()
}

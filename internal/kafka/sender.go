package kafka

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/IBM/sarama"

	"isobar.dev/internal/peer"
)

// ErrAway is the error of Send while there is no connection.
var ErrAway = errors.New("no connection to Kafka")

// Sender sends to one topic. It asks for the word of all in-sync replicas, and its producer is idempotent. After any
// error that is not of one record alone the producer is given up and a new one made: sarama's answers are not to be
// relied on once its sequence numbers and the broker's have parted (it takes a "duplicate sequence number" for success).
// Its methods may be called at the same time.
type Sender struct {
	settings Settings
	topic    string
	options  []func(*sarama.Config)
	link     *peer.Link[*producer]
	turn     atomic.Uint32
}

// producer is one life of the sarama producer.
type producer struct {
	sarama.AsyncProducer
	client  sarama.Client
	sending sync.RWMutex  // held for reading while a record is handed over
	gone    chan struct{} // closed when no more is taken
	failed  chan error    // buffered: the first error that ends it
}

// sent is the metadata of a record: who waits for it.
type sent struct {
	sync.WaitGroup
	mu  sync.Mutex
	err error
}

func (s *sent) fail(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.err == nil {
		s.err = err
	}
}

// NewSender returns a Sender, which connects by itself and stays connected until Close. Records may have 1 MiB, or what
// the options say. Its error names the setting that is wrong.
func NewSender(s Settings, topic string, options ...func(*sarama.Config)) (*Sender, error) {
	k := &Sender{settings: s, topic: topic, options: options}
	if _, err := k.config(); err != nil {
		return nil, err
	}
	k.link = peer.NewLink("Kafka topic "+topic, func(ctx context.Context, up func(*producer)) error {
		return s.Explain(k.use(ctx, up))
	})
	return k, nil
}

// DeadLetters is the option for a topic of dead letters. Such a record is larger than the one that it was, by its reason;
// compressed, it still fits where that one did. What is sent together must fit as well, since Kafka limits the batch.
func DeadLetters(c *sarama.Config) {
	c.Producer.Compression = sarama.CompressionZSTD
	c.Producer.MaxMessageBytes = 64 << 20 // before it is compressed
}

// Send returns nil when all in-sync replicas have every record, and an error if that is not certain of one: ErrAway at
// once while Kafka is known to be away; the first connection after the start is waited for. ctx must have a deadline,
// which is kept. The records are the Sender's for good: sending again takes new ones.
func (k *Sender) Send(ctx context.Context, records ...*sarama.ProducerMessage) error {
	p, err := k.link.Get(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrAway, err)
	}
	partition, err := k.next(p)
	if err != nil {
		return err
	}
	all := new(sent)
	for _, record := range records {
		record.Metadata, record.Partition = all, partition
	}
	err = p.send(ctx, all, records)
	switch {
	case errors.Is(err, sarama.ErrMessageSizeTooLarge):
		return fmt.Errorf("publish to topic %q, whose max.message.bytes is too small for it: %w", k.topic, err)
	case err != nil:
		return fmt.Errorf("publish to topic %q: %w", k.topic, err)
	}
	return nil
}

// next returns the partition for the next call, each in turn. What comes together stays together: a batch that is
// scattered over all partitions by its keys costs as much as eight. Nothing relies on where an event is.
func (k *Sender) next(p *producer) (int32, error) {
	partitions, err := p.client.WritablePartitions(k.topic)
	if err != nil || len(partitions) == 0 {
		return 0, fmt.Errorf("look up the partitions of topic %q: %w", k.topic, errors.Join(err, ErrAway))
	}
	return partitions[int(k.turn.Add(1))%len(partitions)], nil
}

func (p *producer) send(ctx context.Context, all *sent, records []*sarama.ProducerMessage) error {
	for _, record := range records {
		if err := p.hand(ctx, all, record); err != nil {
			return err // what is under way is no longer waited for: nothing is promised
		}
	}
	done := make(chan struct{})
	go func() { all.Wait(); close(done) }()
	select {
	case <-done:
		return all.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// hand gives one record to sarama, unless the producer is being closed: sarama panics on what comes after.
func (p *producer) hand(ctx context.Context, all *sent, record *sarama.ProducerMessage) error {
	p.sending.RLock()
	defer p.sending.RUnlock()
	select {
	case <-p.gone:
		return ErrAway
	default:
	}
	all.Add(1)
	select {
	case p.Input() <- record:
		return nil
	case <-ctx.Done():
		all.Done()
		return ctx.Err()
	case <-p.gone:
		all.Done()
		return ErrAway
	}
}

// Err returns nil while there is a producer, or why there is none.
func (k *Sender) Err() error { return k.link.Err() }

// Close gives up the producer once its records under way have their answers.
func (k *Sender) Close() { k.link.Close() }

func (k *Sender) config() (*sarama.Config, error) {
	c, err := k.settings.Config()
	if err != nil {
		return nil, err
	}
	c.Producer.RequiredAcks = sarama.WaitForAll
	c.Producer.Idempotent = true
	c.Producer.Partitioner = sarama.NewManualPartitioner // see next
	c.Net.MaxOpenRequests = 1                            // what sarama's idempotence asks for; records gather while a request is under way
	c.Producer.Timeout = 5 * time.Second
	c.Producer.Retry.Max = 3 // for a new leader; what takes longer is the caller's to send again
	c.Producer.Retry.Backoff = 100 * time.Millisecond
	c.Producer.Return.Successes = true
	c.Producer.Return.Errors = true
	for _, option := range k.options {
		option(c)
	}
	return c, nil
}

// use makes a producer and keeps it until it fails or ctx ends.
func (k *Sender) use(ctx context.Context, up func(*producer)) error {
	config, err := k.config()
	if err != nil {
		return err
	}
	client, err := sarama.NewClient(k.settings.Brokers, config)
	if err != nil {
		return fmt.Errorf("connect to Kafka: %w", err)
	}
	defer client.Close()
	if _, err := client.Partitions(k.topic); err != nil {
		return fmt.Errorf("look up topic %q: %w", k.topic, err)
	}
	async, err := sarama.NewAsyncProducerFromClient(client)
	if err != nil {
		return fmt.Errorf("make an idempotent producer: %w", err)
	}
	p := &producer{AsyncProducer: async, client: client, gone: make(chan struct{}), failed: make(chan error, 1)}
	results := p.collect()
	up(p)

	select {
	case <-ctx.Done():
		err = ctx.Err()
	case err = <-p.failed:
	}
	close(p.gone)
	p.sending.Lock() // no record is being handed over any more
	p.AsyncClose()
	p.sending.Unlock()
	<-results
	return err
}

// collect gives each record's result to who waits for it, until the producer is closed.
func (p *producer) collect() (done chan struct{}) {
	done = make(chan struct{})
	var both sync.WaitGroup
	both.Go(func() {
		for record := range p.Successes() {
			record.Metadata.(*sent).Done()
		}
	})
	both.Go(func() {
		for failure := range p.Errors() {
			waiting := failure.Msg.Metadata.(*sent)
			waiting.fail(failure.Err)
			waiting.Done()
			if !ofOneRecord(failure.Err) {
				select {
				case p.failed <- failure.Err:
				default:
				}
			}
		}
	})
	go func() { both.Wait(); close(done) }()
	return done
}

// ofOneRecord tells of an error whether it says nothing of the connection.
func ofOneRecord(err error) bool {
	return errors.Is(err, sarama.ErrMessageSizeTooLarge) || errors.Is(err, sarama.ErrInvalidMessage)
}

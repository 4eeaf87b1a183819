package main

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/IBM/sarama"
	"github.com/cloudevents/sdk-go/v2/event"

	"isobar.dev/events"
	"isobar.dev/internal/kafka"
	"isobar.dev/internal/peer"
)

// errKafkaAway is the error of Publish while there is no connection.
var errKafkaAway = errors.New("no connection to Kafka")

// kafkaTopic is the Broker that is a topic of Kafka. It asks for the word of all in-sync replicas, and its producer is
// idempotent. After any error that is not of one record alone the producer is given up and a new one made: sarama's
// answers are not to be relied on once its sequence numbers and the broker's have parted (it takes a "duplicate
// sequence number" for success).
type kafkaTopic struct {
	settings kafka.Settings
	topic    string
	link     *peer.Link[*producer]
	turn     atomic.Uint32
}

var _ Broker = (*kafkaTopic)(nil)

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

// newKafka checks the settings; its error names the variable that is wrong.
func newKafka(s kafka.Settings, topic string) (*kafkaTopic, error) {
	k := &kafkaTopic{settings: s, topic: topic}
	if _, err := k.config(); err != nil {
		return nil, err
	}
	k.link = peer.NewLink("Kafka topic "+topic, func(ctx context.Context, up func(*producer)) error {
		return s.Explain(k.use(ctx, up))
	})
	return k, nil
}

func (k *kafkaTopic) Publish(ctx context.Context, reports []event.Event) error {
	records := make([]*sarama.ProducerMessage, len(reports))
	all := new(sent)
	for i := range reports {
		record, err := events.WriteRecord(&reports[i], k.topic)
		if err != nil {
			return err
		}
		record.Metadata = all
		records[i] = record
	}
	p, err := k.link.Get(ctx)
	if err != nil {
		return fmt.Errorf("%w: %w", errKafkaAway, err)
	}
	partition, err := k.next(p)
	if err != nil {
		return err
	}
	for _, record := range records {
		record.Partition = partition
	}
	if err := p.send(ctx, all, records); err != nil {
		return fmt.Errorf("publish to topic %q: %w", k.topic, err)
	}
	return nil
}

// next returns the partition for the next call, each in turn. What comes together stays together: a batch that is
// scattered over all partitions by its keys costs as much as eight. Nothing relies on where an event is.
func (k *kafkaTopic) next(p *producer) (int32, error) {
	partitions, err := p.client.WritablePartitions(k.topic)
	if err != nil || len(partitions) == 0 {
		return 0, fmt.Errorf("look up the partitions of topic %q: %w", k.topic, errors.Join(err, errKafkaAway))
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
		return errKafkaAway
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
		return errKafkaAway
	}
}

// Err returns nil while there is a producer, or why there is none.
func (k *kafkaTopic) Err() error { return k.link.Err() }

// Close gives up the producer once its records under way have their answers.
func (k *kafkaTopic) Close() { k.link.Close() }

func (k *kafkaTopic) config() (*sarama.Config, error) {
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
	return c, nil
}

// use makes a producer and keeps it until it fails or ctx ends.
func (k *kafkaTopic) use(ctx context.Context, up func(*producer)) error {
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

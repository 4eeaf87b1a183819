package source

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	amqp "github.com/Azure/go-amqp"
	"github.com/IBM/sarama"
	"github.com/cloudevents/sdk-go/v2/event"

	"isobar.dev/config/local"
	"isobar.dev/events"
	"isobar.dev/internal/cut"
	"isobar.dev/internal/kafka"
	"isobar.dev/internal/rabbit"
)

// world is one kind of broker as the conformance suite sees it: a real server, behind a proxy that can cut.
type world struct {
	server  *local.Process
	proxy   *cut.Proxy
	program string // which delivers from it
	// open returns the source under test of a topic or queue, with NAME.dead for its dead letters, through the proxy.
	open func(name string) Source
	// env is what program is told to do the same.
	env    func(name string) []string
	create func(t testing.TB, name string)
	remove func(t testing.TB, name string)
	// publish returns once the broker has all of them.
	publish func(t testing.TB, name string, all []event.Event)
	// foreign publishes a body that is no CloudEvent, and returns what its id must be.
	foreign func(t testing.TB, name, body string) (id string)
	// dead sends the dead letters of a topic or queue, until ctx ends.
	dead func(ctx context.Context, t testing.TB, name string, letters chan<- event.Event)
}

// opened is a source whose settings are right.
func opened[S Source](src S, err error) S {
	if err != nil {
		panic(err)
	}
	return src
}

func config(t testing.TB, s kafka.Settings) *sarama.Config {
	t.Helper()
	c, err := s.Config()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func startKafka(t testing.TB) *world {
	proxy := cut.Listen(t)
	w := kafkaWorld(kafka.Settings{Brokers: []string{proxy.Addr()}})
	w.proxy = proxy
	if err := local.Install(t.Context(), t.Output(), local.KafkaKind); err != nil {
		t.Fatal(err)
	}
	port, err := local.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	w.server = local.Kafka(t.TempDir(), port, local.Config("advertised.listeners=PLAINTEXT://"+proxy.Addr()))
	proxy.To(w.server.Addr()) // before it starts: it is ready when it answers where it is advertised
	t.Cleanup(func() {
		if err := w.server.Kill(); err != nil {
			t.Error(err)
		}
	})
	if err := w.server.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w
}

// kafkaWorld is one without a server and a proxy of its own.
func kafkaWorld(settings kafka.Settings) *world {
	w := &world{program: "kafka-source"}
	w.open = func(name string) Source {
		return opened(NewKafka(KafkaSettings{Settings: settings, Topic: name, DeadTopic: name + ".dead", GroupID: name, InstanceID: "test"}))
	}
	w.env = func(name string) []string {
		return []string{
			"KAFKA_BOOTSTRAP_SERVERS=" + settings.Brokers[0], "KAFKA_TOPIC=" + name, "KAFKA_DEAD_TOPIC=" + name + ".dead",
			"KAFKA_GROUP_ID=" + name, "KAFKA_GROUP_INSTANCE_ID=test",
		}
	}
	admin := func(t testing.TB, do func(sarama.ClusterAdmin) error) {
		t.Helper()
		c := config(t, settings)
		c.Metadata.Retry.Max = 10
		admin, err := sarama.NewClusterAdmin(settings.Brokers, c)
		if err != nil {
			t.Fatal(err)
		}
		defer admin.Close()
		if err := do(admin); err != nil {
			t.Fatal(err)
		}
	}
	w.create = func(t testing.TB, name string) {
		t.Helper()
		topic := &sarama.TopicDetail{NumPartitions: partitions, ReplicationFactor: 1}
		if limit := "2097152"; strings.HasSuffix(name, ".dead") { // as message.dead has it
			topic.ConfigEntries = map[string]*string{"max.message.bytes": &limit}
		}
		admin(t, func(a sarama.ClusterAdmin) (err error) {
			for range 100 { // a topic of the name may still be on its way out
				err = a.CreateTopic(name, topic, false)
				if err == nil {
					break
				}
				time.Sleep(50 * time.Millisecond)
			}
			return err
		})
		w.awaitLeaders(t, settings, name)
	}
	w.remove = func(t testing.TB, name string) {
		t.Helper()
		admin(t, func(a sarama.ClusterAdmin) error { return a.DeleteTopic(name) })
	}
	send := func(t testing.TB, records ...*sarama.ProducerMessage) {
		t.Helper()
		c := config(t, settings)
		c.Metadata.Retry.Max = 20
		c.Producer.Retry.Max = 20
		c.Producer.RequiredAcks = sarama.WaitForAll
		c.Producer.Return.Successes = true
		producer, err := sarama.NewSyncProducer(settings.Brokers, c)
		if err != nil {
			t.Fatal(err)
		}
		defer dismiss(producer)
		if err := producer.SendMessages(records); err != nil {
			t.Fatal(err)
		}
	}
	w.publish = func(t testing.TB, name string, all []event.Event) {
		t.Helper()
		var records []*sarama.ProducerMessage
		for i := range all {
			record, err := events.WriteRecord(&all[i], name)
			if err != nil {
				t.Fatal(err)
			}
			records = append(records, record)
		}
		send(t, records...)
	}
	w.foreign = func(t testing.TB, name, body string) string {
		t.Helper()
		record := &sarama.ProducerMessage{Topic: name, Value: sarama.StringEncoder(body)}
		send(t, record)
		return fmt.Sprintf("partition:%d/offset:%d", record.Partition, record.Offset)
	}
	w.dead = func(ctx context.Context, t testing.TB, name string, letters chan<- event.Event) {
		c := config(t, settings)
		c.Metadata.Retry.Max = 20
		consumer, err := sarama.NewConsumer(settings.Brokers, c)
		if err != nil {
			t.Error(err)
			return
		}
		defer dismiss(consumer)
		partitions, err := consumer.Partitions(name + ".dead")
		if err != nil {
			t.Error(err)
			return
		}
		var reading sync.WaitGroup
		defer reading.Wait()
		for _, partition := range partitions {
			p, err := consumer.ConsumePartition(name+".dead", partition, sarama.OffsetOldest)
			if err != nil {
				t.Error(err)
				return
			}
			reading.Go(func() {
				defer dismiss(p)
				for {
					select {
					case record := <-p.Messages():
						letters <- events.ReadRecord(record, "/dead")
					case <-ctx.Done():
						return
					}
				}
			})
		}
	}
	return w
}

const partitions = 4

// awaitLeaders waits until all partitions of a topic can be used.
func (w *world) awaitLeaders(t testing.TB, settings kafka.Settings, topic string) {
	t.Helper()
	client, err := sarama.NewClient(settings.Brokers, config(t, settings))
	if err != nil {
		t.Fatal(err)
	}
	defer dismiss(client)
	for p := range int32(partitions) {
		for range 200 {
			if _, err = client.GetOffset(topic, p, sarama.OffsetNewest); err == nil {
				break
			}
			time.Sleep(20 * time.Millisecond)
			_ = client.RefreshMetadata(topic)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func startRabbitMQ(t testing.TB, options ...local.Option) *world {
	management, err := local.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	proxy := cut.Listen(t)
	server := local.StartRabbitMQ(t, append(options, local.Management(management))...)
	proxy.To(server.Addr())
	w := rabbitWorld(management, rabbit.Settings{Addr: proxy.Addr()}, rabbit.Settings{Addr: server.Addr()})
	w.server, w.proxy = server, proxy
	return w
}

// rabbitWorld is one without a server and a proxy of its own: settings are those of the source, direct those of others.
func rabbitWorld(management int, settings, direct rabbit.Settings) *world {
	w := &world{program: "rabbitmq-source"}
	w.open = func(name string) Source {
		return opened(NewRabbit(RabbitSettings{Settings: settings, Queue: name, DeadQueue: name + ".dead"}))
	}
	w.env = func(name string) []string {
		return []string{"RABBITMQ_ADDR=" + settings.Addr, "RABBITMQ_QUEUE=" + name, "RABBITMQ_DEAD_QUEUE=" + name + ".dead"}
	}
	api := func(t testing.TB, method, path, body string) {
		t.Helper()
		request, err := http.NewRequest(method, fmt.Sprintf("http://127.0.0.1:%d/api/%s", management, path), strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		request.SetBasicAuth(local.RabbitUser, local.RabbitPassword)
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		if said, _ := io.ReadAll(response.Body); response.StatusCode >= 300 {
			t.Fatalf("%s %s: %s %s", method, path, response.Status, said)
		}
	}
	w.create = func(t testing.TB, name string) {
		t.Helper()
		api(t, http.MethodPut, "queues/%2F/"+name, `{"durable":true,"arguments":{"x-queue-type":"quorum","x-delivery-limit":-1}}`)
	}
	w.remove = func(t testing.TB, name string) { t.Helper(); api(t, http.MethodDelete, "queues/%2F/"+name, "") }
	w.publish = func(t testing.TB, name string, all []event.Event) {
		t.Helper()
		sender := rabbit.NewSender(direct, name)
		defer sender.Close()
		messages := make([]*amqp.Message, len(all))
		for i := range all {
			messages[i] = events.WriteMessage(&all[i])
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		for sender.Err() != nil && ctx.Err() == nil {
			time.Sleep(5 * time.Millisecond)
		}
		if err := sender.Send(ctx, messages...); err != nil {
			t.Fatal(err)
		}
	}
	w.foreign = func(t testing.TB, name, body string) string {
		t.Helper()
		// The management plugin publishes as an AMQP 0.9.1 client does.
		id := fmt.Sprintf("m-%d", time.Now().UnixNano())
		message, err := json.Marshal(map[string]any{
			"routing_key": name, "payload": body, "payload_encoding": "string",
			"properties": map[string]any{"message_id": id, "content_type": "application/json", "delivery_mode": 2},
		})
		if err != nil {
			t.Fatal(err)
		}
		api(t, http.MethodPost, "exchanges/%2F/amq.default/publish", string(message))
		return id
	}
	w.dead = func(ctx context.Context, t testing.TB, name string, letters chan<- event.Event) {
		conn, err := rabbit.Dial(ctx, direct)
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		session, err := conn.NewSession()
		if err != nil {
			t.Error(err)
			return
		}
		receiver, err := session.NewReceiver(amqp.LinkSourceAddress(rabbit.Queue(name+".dead")), amqp.LinkCredit(500))
		if err != nil {
			t.Error(err)
			return
		}
		for {
			m, err := receiver.Receive(ctx)
			if err != nil {
				return
			}
			letters <- events.ReadMessage(m, "/dead")
		}
	}
	return w
}

// running delivers from a source until stop, or until the test ends.
type running struct {
	stop    context.CancelFunc
	stopped chan struct{}
}

func deliver(t *testing.T, src Source, settings SinkSettings) *running {
	t.Helper()
	sink, err := NewSink(settings)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{cancel, make(chan struct{})}
	go func() {
		defer close(r.stopped)
		Deliver(ctx, src, sink, 1000)
		src.Close()
	}()
	t.Cleanup(r.end)
	return r
}

// end tells it to stop and waits until it has.
func (r *running) end() {
	r.stop()
	<-r.stopped
}

// recorder is a sink whose answers the test decides, and which remembers what it has taken.
type recorder struct {
	*httptest.Server
	changed *sync.Cond
	// decide answers a POST; the recorder remembers its events if the status is 2xx.
	decide func(batch []event.Event) (status int, problem map[string]any)

	mu    sync.Mutex
	taken map[string]int // by id, how often
	posts int            // those answered with 2xx
	last  map[string]event.Event
	tries int
}

func record(t *testing.T) *recorder {
	t.Helper()
	return recordAt(t, "127.0.0.1:0")
}

func recordAt(t *testing.T, addr string) *recorder {
	t.Helper()
	s := &recorder{taken: map[string]int{}, last: map[string]event.Event{}}
	s.changed = sync.NewCond(&s.mu)
	s.decide = func([]event.Event) (int, map[string]any) { return http.StatusNoContent, nil }
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(s.serve))
	s.Server.Listener.Close()
	s.Server.Listener = listener
	s.Server.Start()
	t.Cleanup(func() {
		s.Server.CloseClientConnections()
		s.Server.Close()
	})
	return s
}

func (s *recorder) serve(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return // the source has gone
	}
	var batch []event.Event
	switch r.Header.Get("Content-Type") {
	case batchMediaType:
		batch, err = events.ParseBatch(body)
	case eventMediaType:
		batch = make([]event.Event, 1)
		batch[0], err = events.Parse(body)
	default:
		err = fmt.Errorf("content type %q", r.Header.Get("Content-Type"))
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusTeapot)
		return
	}
	s.mu.Lock()
	s.tries++
	decide := s.decide
	s.changed.Broadcast()
	s.mu.Unlock()
	status, problem := decide(batch)
	if status < 300 {
		s.mu.Lock()
		s.posts++
		for _, e := range batch {
			s.taken[e.ID()]++
			s.last[e.ID()] = e
		}
		s.changed.Broadcast()
		s.mu.Unlock()
	}
	if problem != nil {
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(problem)
		return
	}
	w.WriteHeader(status)
}

func (s *recorder) settings() SinkSettings { return SinkSettings{Sink: s.URL} }

func (s *recorder) answer(decide func(batch []event.Event) (int, map[string]any)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.decide = decide
}

// await waits until a condition holds, which is asked under the lock after each POST.
func (s *recorder) await(t *testing.T, what string, holds func() bool) {
	t.Helper()
	timeout := time.AfterFunc(90*time.Second, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.changed.Broadcast()
	})
	deadline := time.Now().Add(90 * time.Second)
	defer timeout.Stop()
	s.mu.Lock()
	defer s.mu.Unlock()
	for !holds() {
		if time.Now().After(deadline) {
			t.Fatalf("not within 90 s: %s; %d events taken in %d posts of %d", what, len(s.taken), s.posts, s.tries)
		}
		s.changed.Wait()
	}
}

func (s *recorder) awaitAll(t *testing.T, all []event.Event) {
	t.Helper()
	missing := len(all)
	s.await(t, "all events are taken", func() bool {
		for missing > 0 && s.taken[all[missing-1].ID()] > 0 {
			missing--
		}
		return missing == 0
	})
}

// deadLetters waits for n dead letters with ids of their own, and returns them by id.
func (w *world) deadLetters(t *testing.T, name string, n int) map[string]event.Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	letters := make(chan event.Event, 1000)
	var reading sync.WaitGroup
	reading.Go(func() { w.dead(ctx, t, name, letters) })
	defer reading.Wait()
	defer cancel()
	found := map[string]event.Event{}
	for len(found) < n {
		select {
		case e := <-letters:
			found[e.ID()] = e
		case <-ctx.Done():
			t.Fatalf("%d dead letters, want %d", len(found), n)
		}
	}
	return found
}

func reports(prefix string, n int) []event.Event {
	all := make([]event.Event, n)
	for i := range all {
		all[i] = events.New(events.Report{Country: "GT", Weather: "Sunny", Description: "Test"}, fmt.Sprintf("%s-%d", prefix, i), time.Now())
	}
	return all
}

// freeAddr is an address on which nothing listens.
func freeAddr(t testing.TB) string {
	t.Helper()
	port, err := local.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	return net.JoinHostPort("127.0.0.1", fmt.Sprint(port))
}

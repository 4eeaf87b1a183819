package main

import (
	"context"
	"fmt"
	"io"
	"maps"
	"net/http"
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
	server *local.Process
	proxy  *cut.Proxy
	// open opens the broker under test on a topic or queue, through the proxy.
	open func(name string) Broker
	// create makes a topic or queue, of which refuses says that it must store nothing more than one message.
	create func(t *testing.T, name string, refuses bool)
	remove func(t *testing.T, name string)
	// read sends the id of each stored event, as the SDK reads it, until ctx ends.
	read func(ctx context.Context, t *testing.T, name string, ids chan<- string)
}

func TestBrokers(t *testing.T) {
	for name, start := range map[string]func(*testing.T) *world{"Kafka": startKafka, "RabbitMQ": startRabbitMQ} {
		t.Run(name, func(t *testing.T) {
			w := start(t)
			for name, test := range map[string]func(*testing.T, *world){
				"what it confirms is stored, and reads as it was":            testStored,
				"a missing topic or queue is an error until it is there":     testMissing,
				"a topic or queue that is deleted is an error":               testDeleted,
				"what is refused is an error":                                testRefused,
				"a broker that is silent is given up at the deadline":        testSilent,
				"while it is away calls fail fast":                           testAway,
				"after Close nothing is confirmed":                           testClosed,
				"killed while 10,000 are published: what it confirmed is in": testKilled,
				"cut in mid-flight: what it confirmed is in":                 testCut,
			} {
				t.Run(name, func(t *testing.T) { test(t, w) })
			}
		})
	}
}

func reports(prefix string, n int) []event.Event {
	all := make([]event.Event, n)
	for i := range all {
		all[i] = events.New(events.Report{Country: "GT", Weather: "Sunny", Description: "Test"}, fmt.Sprintf("%s-%d", prefix, i), time.Now())
	}
	return all
}

// publish publishes once, with a deadline.
func publish(b Broker, timeout time.Duration, all ...event.Event) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	return b.Publish(ctx, all)
}

// insist publishes until it is confirmed.
func insist(t *testing.T, b Broker, all ...event.Event) {
	t.Helper()
	var err error
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); {
		if err = publish(b, 5*time.Second, all...); err == nil {
			return
		}
		select {
		case <-t.Context().Done():
		case <-time.After(20 * time.Millisecond):
		}
	}
	t.Errorf("not confirmed within a minute: %v", err)
}

// expect waits until every id is stored.
func (w *world) expect(t *testing.T, name string, ids map[string]bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	got := make(chan string, 100)
	var reading sync.WaitGroup
	reading.Go(func() { w.read(ctx, t, name, got) })
	defer reading.Wait()
	defer cancel()
	missing := len(ids)
	for missing > 0 {
		select {
		case id := <-got:
			if ids[id] {
				ids[id] = false
				missing--
			}
		case <-ctx.Done():
			t.Fatalf("%d of %d that were confirmed are not stored", missing, len(ids))
		}
	}
}

func idsOf(all []event.Event) map[string]bool {
	ids := make(map[string]bool, len(all))
	for i := range all {
		ids[all[i].ID()] = true
	}
	return ids
}

// opened is a broker whose settings are right.
func opened[B Broker](b B, err error) Broker {
	if err != nil {
		panic(err)
	}
	return b
}

func (w *world) opened(t *testing.T, name string, refuses bool) Broker {
	t.Helper()
	w.create(t, name, refuses)
	b := w.open(name)
	t.Cleanup(b.Close)
	for deadline := time.Now().Add(20 * time.Second); b.Err() != nil; {
		if time.Now().After(deadline) {
			t.Fatalf("does not connect: %v", b.Err())
		}
		time.Sleep(5 * time.Millisecond)
	}
	return b
}

func testStored(t *testing.T, w *world) {
	b := w.opened(t, "stored", false)
	all := reports("stored", 1000)
	insist(t, b, all...)
	w.expect(t, "stored", idsOf(all))
}

func testMissing(t *testing.T, w *world) {
	b := w.open("missing")
	t.Cleanup(b.Close)
	if err := publish(b, time.Second, reports("missing", 1)...); err == nil {
		t.Fatal("confirmed, without a place to store it")
	}
	w.create(t, "missing", false)
	all := reports("found", 10)
	insist(t, b, all...)
	w.expect(t, "missing", idsOf(all))
}

func testDeleted(t *testing.T, w *world) {
	b := w.opened(t, "deleted", false)
	insist(t, b, reports("before", 10)...)
	w.remove(t, "deleted")
	for i := range 20 {
		if err := publish(b, time.Second, reports("gone", 5)...); err == nil {
			t.Fatalf("call %d confirmed what has no place to be stored", i)
		}
	}
	w.create(t, "deleted", false)
	all := reports("after", 10)
	insist(t, b, all...)
	w.expect(t, "deleted", idsOf(all))
}

func testRefused(t *testing.T, w *world) {
	b := w.opened(t, "refused", true)
	// Of one call at a time, at most the first may have found room.
	confirmed := 0
	for i := range 10 {
		if publish(b, 5*time.Second, reports(fmt.Sprint("refused-", i), 1)...) == nil {
			confirmed++
		}
	}
	if confirmed > 2 {
		t.Errorf("%d of 10 were confirmed, where there is room for one", confirmed)
	}
	if err := publish(b, 5*time.Second, reports("many", 20)...); err == nil {
		t.Error("20 at once were confirmed")
	}
}

func testSilent(t *testing.T, w *world) {
	b := w.opened(t, "silent", false)
	insist(t, b, reports("before", 1)...)
	if err := w.server.Pause(); err != nil {
		t.Fatal(err)
	}
	start := time.Now()
	err := publish(b, 500*time.Millisecond, reports("silent", 10)...)
	took := time.Since(start)
	if err := w.server.Resume(); err != nil {
		t.Fatal(err)
	}
	if err == nil {
		t.Error("confirmed by a broker that is stopped")
	}
	if took > 5*time.Second {
		t.Errorf("the deadline of 0.5 s was kept only after %v", took)
	}
	insist(t, b, reports("after", 1)...)
}

func testAway(t *testing.T, w *world) {
	b := w.opened(t, "away", false)
	insist(t, b, reports("before", 1)...)
	w.proxy.Refuse()
	defer w.proxy.Accept()
	for publish(b, 5*time.Second, reports("broken", 1)...) == nil {
		t.Fatal("confirmed over a cut connection")
	}
	for deadline := time.Now().Add(20 * time.Second); b.Err() == nil; {
		if time.Now().After(deadline) {
			t.Fatal("does not notice that it is away")
		}
		_ = publish(b, time.Second, reports("noticing", 1)...)
	}
	start := time.Now()
	for range 100 {
		if publish(b, 5*time.Second, reports("away", 1)...) == nil {
			t.Fatal("confirmed while away")
		}
	}
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("100 calls took %v", took)
	}
	w.proxy.Accept()
	insist(t, b, reports("after", 1)...)
}

func testClosed(t *testing.T, w *world) {
	b := w.opened(t, "closed", false)
	insist(t, b, reports("before", 1)...)
	var publishing sync.WaitGroup
	var mu sync.Mutex
	confirmed := map[string]bool{}
	some := make(chan struct{})
	var once sync.Once
	for i := range 8 {
		publishing.Go(func() {
			for n := range 2000 {
				all := reports(fmt.Sprintf("closing-%d-%d", i, n), 5)
				if publish(b, 10*time.Second, all...) != nil {
					return
				}
				mu.Lock()
				maps.Copy(confirmed, idsOf(all))
				mu.Unlock()
				once.Do(func() { close(some) })
			}
		})
	}
	<-some
	b.Close()
	publishing.Wait()
	if err := publish(b, time.Second, reports("late", 1)...); err == nil {
		t.Error("confirmed after Close")
	}
	w.expect(t, "closed", confirmed)
}

func testKilled(t *testing.T, w *world) {
	b := w.opened(t, "killed", false)
	// RabbitMQ 4.0 forgets a quorum queue, and what is in it, when it is killed within half a second of the queue's
	// creation: ra saves the names of its members at that interval. It says so in its log only.
	time.Sleep(2 * time.Second)
	underFault(t, w, b, "killed", func() {
		if err := w.server.Kill(); err != nil {
			t.Error(err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := w.server.Start(ctx); err != nil {
			t.Error(err)
		}
	})
}

func testCut(t *testing.T, w *world) {
	b := w.opened(t, "cut", false)
	underFault(t, w, b, "cut", func() { w.proxy.Cut() })
}

// underFault publishes 10,000 in batches of 1 to 100 from eight goroutines, which insist; the fault happens after a
// third of them. What was confirmed is all of them: each one must be stored.
func underFault(t *testing.T, w *world, b Broker, name string, fault func()) {
	t.Helper()
	all := reports(name, 10_000)
	var next int
	var mu sync.Mutex
	third := make(chan struct{})
	take := func() []event.Event {
		mu.Lock()
		defer mu.Unlock()
		n := min(1+next%100, len(all)-next)
		batch := all[next : next+n]
		if next < 3333 && next+n >= 3333 {
			close(third)
		}
		next += n
		return batch
	}
	var publishing sync.WaitGroup
	for range 8 {
		publishing.Go(func() {
			for batch := take(); len(batch) > 0; batch = take() {
				insist(t, b, batch...)
			}
		})
	}
	<-third
	fault()
	publishing.Wait()
	w.expect(t, name, idsOf(all))
}

func startKafka(t *testing.T) *world {
	proxy := cut.Listen(t)
	w := &world{proxy: proxy}
	if err := local.Install(t.Context(), t.Output(), local.KafkaKind); err != nil {
		t.Fatal(err)
	}
	// Kafka tells its clients where it is, so that the proxy must lead there before it starts.
	w.server = local.Kafka(t.TempDir(), freePort(t), local.Config("advertised.listeners=PLAINTEXT://"+proxy.Addr()))
	proxy.To(w.server.Addr())
	t.Cleanup(func() {
		if err := w.server.Kill(); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := w.server.Start(ctx); err != nil {
		t.Fatalf("%v\n%s", err, local.Tail(w.server.Log(), 30))
	}
	w.open = func(name string) Broker {
		return opened(newKafka(kafka.Settings{Brokers: []string{proxy.Addr()}}, name))
	}
	admin := func(t *testing.T) sarama.ClusterAdmin {
		c := sarama.NewConfig()
		c.Version = sarama.V3_0_0_0
		admin, err := sarama.NewClusterAdmin([]string{proxy.Addr()}, c)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { admin.Close() })
		return admin
	}
	w.create = func(t *testing.T, name string, refuses bool) {
		detail := &sarama.TopicDetail{NumPartitions: 4, ReplicationFactor: 1}
		if refuses {
			bytes := "100" // less than any record of ours
			detail.ConfigEntries = map[string]*string{"max.message.bytes": &bytes}
		}
		var err error
		for range 100 { // a topic of the name may still be on its way out
			if err = admin(t).CreateTopic(name, detail, false); err == nil {
				return
			}
			time.Sleep(100 * time.Millisecond)
		}
		t.Fatal(err)
	}
	w.remove = func(t *testing.T, name string) {
		if err := admin(t).DeleteTopic(name); err != nil {
			t.Fatal(err)
		}
	}
	w.read = func(ctx context.Context, t *testing.T, name string, ids chan<- string) {
		c := sarama.NewConfig()
		c.Version = sarama.V3_0_0_0
		consumer, err := sarama.NewConsumer([]string{proxy.Addr()}, c)
		if err != nil {
			t.Error(err)
			return
		}
		defer consumer.Close()
		partitions, err := consumer.Partitions(name)
		if err != nil {
			t.Error(err)
			return
		}
		var reading sync.WaitGroup
		for _, partition := range partitions {
			p, err := consumer.ConsumePartition(name, partition, sarama.OffsetOldest)
			if err != nil {
				t.Error(err)
				return
			}
			reading.Go(func() {
				defer p.Close()
				for {
					select {
					case record := <-p.Messages():
						e := events.ReadRecord(record, "/kafka/"+name)
						if string(record.Key) != e.ID() {
							t.Errorf("the key is %q, the id %q", record.Key, e.ID())
						}
						send(ctx, t, ids, &e)
					case <-ctx.Done():
						return
					}
				}
			})
		}
		reading.Wait()
	}
	return w
}

// send checks that an event came as it was sent, and sends its id.
func send(ctx context.Context, t *testing.T, ids chan<- string, e *event.Event) {
	want := reports("", 1)[0]
	if e.Type() != want.Type() || e.Source() != want.Source() || e.Subject() != "GT" || string(e.Data()) != string(want.Data()) || e.DataContentType() != "application/json" {
		t.Errorf("stored %s", e)
	}
	select {
	case ids <- e.ID():
	case <-ctx.Done():
	}
}

func startRabbitMQ(t *testing.T) *world {
	management := freePort(t)
	proxy := cut.Listen(t)
	w := &world{proxy: proxy}
	w.server = local.StartRabbitMQ(t, local.Management(management))
	proxy.To(w.server.Addr())
	w.open = func(name string) Broker {
		return opened(newRabbitMQ(rabbit.Settings{Addr: proxy.Addr()}, name))
	}
	api := func(t *testing.T, method, name, body string) {
		t.Helper()
		url := fmt.Sprintf("http://127.0.0.1:%d/api/queues/%%2F/%s", management, name)
		request, err := http.NewRequest(method, url, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		request.SetBasicAuth("guest", "guest")
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		if response.StatusCode >= 300 {
			said, _ := io.ReadAll(response.Body)
			t.Fatalf("%s %s: %s %s", method, url, response.Status, said)
		}
	}
	w.create = func(t *testing.T, name string, refuses bool) {
		arguments := `"x-queue-type":"quorum"`
		if refuses {
			arguments += `,"x-max-length":1,"x-overflow":"reject-publish"`
		}
		api(t, http.MethodPut, name, `{"durable":true,"arguments":{`+arguments+`}}`)
	}
	w.remove = func(t *testing.T, name string) { api(t, http.MethodDelete, name, "") }
	w.read = func(ctx context.Context, t *testing.T, name string, ids chan<- string) {
		conn, err := rabbit.Dial(ctx, rabbit.Settings{Addr: w.server.Addr()})
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
		receiver, err := session.NewReceiver(amqp.LinkSourceAddress(rabbit.Queue(name)), amqp.LinkCredit(500))
		if err != nil {
			t.Error(err)
			return
		}
		for {
			m, err := receiver.Receive(ctx)
			if err != nil {
				return
			}
			e := events.ReadMessage(m, "/rabbitmq/"+name)
			send(ctx, t, ids, &e)
		}
	}
	return w
}

func freePort(t *testing.T) int {
	port, err := local.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	return port
}

package source

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/IBM/sarama"
	"github.com/cloudevents/sdk-go/v2/event"
)

// session remembers what is committed.
type session struct {
	sarama.ConsumerGroupSession
	marked []int64
}

func (s *session) MarkOffset(_ string, _ int32, offset int64, metadata string) {
	if metadata != "topic-id" {
		panic("an offset without the topic's id")
	}
	s.marked = append(s.marked, offset)
}

func TestPartitionCommitsWhatIsContiguous(t *testing.T) {
	for name, c := range map[string]struct {
		offsets []int64
		settles [][]int64 // positions
		want    []int64   // committed
	}{
		"in order":                     {[]int64{0, 1, 2}, [][]int64{{0}, {1, 2}}, []int64{1, 3}},
		"the last first":               {[]int64{0, 1, 2}, [][]int64{{2}, {1}, {0}}, []int64{3}},
		"one is missing":               {[]int64{0, 1, 2}, [][]int64{{0, 2}}, []int64{1}},
		"offsets with gaps":            {[]int64{5, 9, 20}, [][]int64{{1}, {0}, {2}}, []int64{10, 21}},
		"the first never":              {[]int64{0, 1, 2}, [][]int64{{1, 2}}, nil},
		"nothing of what is not taken": {[]int64{0}, nil, nil},
	} {
		t.Run(name, func(t *testing.T) {
			s := &session{}
			p := &partition{member: &member{kafka: new(Kafka), topicID: "topic-id"}, session: s, idle: make(chan struct{})}
			for _, offset := range c.offsets {
				p.takes(p.arrives(offset))
			}
			for _, at := range c.settles {
				p.settles(at)
			}
			if !slices.Equal(s.marked, c.want) {
				t.Errorf("committed %v, want %v", s.marked, c.want)
			}
		})
	}
}

func TestPartitionThatIsTakenAway(t *testing.T) {
	s := &session{}
	p := &partition{member: &member{kafka: new(Kafka), topicID: "topic-id"}, session: s, idle: make(chan struct{})}
	first, second := p.arrives(0), p.arrives(1)
	if !p.takes(first) {
		t.Fatal("not handed out")
	}
	released := make(chan struct{})
	go func() {
		defer close(released)
		p.release()
	}()
	for handedOut := true; handedOut; { // until the release has begun
		if handedOut = p.takes(second); handedOut {
			p.mu.Lock()
			p.under--
			p.mu.Unlock()
		}
	}
	p.settles([]int64{first})
	select {
	case <-released:
	case <-time.After(handover / 2):
		t.Fatal("it waits though nothing is under way")
	}
	if !slices.Equal(s.marked, []int64{1}) {
		t.Errorf("committed %v", s.marked)
	}
	p.settles([]int64{second})
	if !slices.Equal(s.marked, []int64{1}) {
		t.Errorf("committed %v after the partition was given away", s.marked)
	}
}

func TestPartitionOfATopicThatIsGoneCommitsNothing(t *testing.T) {
	s := &session{}
	m := &member{kafka: new(Kafka), topicID: "topic-id"}
	p := &partition{member: m, session: s, idle: make(chan struct{})}
	p.takes(p.arrives(0))
	m.changed.Store(true)
	p.settles([]int64{0})
	if len(s.marked) != 0 {
		t.Errorf("committed %v", s.marked)
	}
}

// TestKafkaRebalance lets members come and go while 10,000 events are delivered.
func TestKafkaRebalance(t *testing.T) {
	w := startKafka(t)
	const name = "rebalance"
	w.create(t, name)
	sink := record(t)
	sink.answer(func(batch []event.Event) (int, map[string]any) {
		time.Sleep(time.Duration(len(batch)) * 100 * time.Microsecond) // so that it takes a while
		return 204, nil
	})
	open := func() *Kafka {
		settings := w.open(name).(*Kafka).settings
		settings.InstanceID = ""
		return opened(NewKafka(settings))
	}
	all := reports("a", 10_000)
	w.publish(t, name, all[:5000])
	deliver(t, open(), sink.settings())
	sink.await(t, "the first member delivers", func() bool { return len(sink.taken) > 0 })
	other := open()
	second := deliver(t, other, sink.settings())
	awaitState(t, other, "connected, 2 partitions")
	w.publish(t, name, all[5000:])
	sink.await(t, "more is delivered", func() bool { return len(sink.taken) > 6000 })
	second.end()
	sink.awaitAll(t, all)
	twice := 0
	for _, times := range sink.taken {
		if times > 1 {
			twice++
		}
	}
	if twice > 0 {
		t.Errorf("%d events were delivered twice, though every member had the time to settle", twice)
	}
}

func awaitState(t *testing.T, src Source, prefix string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	for !strings.HasPrefix(src.State(), prefix) {
		select {
		case <-ctx.Done():
			t.Fatalf("the source is %q, and not %q", src.State(), prefix)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

package source

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"

	"isobar.dev/events"
	"isobar.dev/internal/peer"
)

// The attributes with which Knative marks a dead letter: where it was to go, with which status it was refused and why.
const (
	errorDest = "knativeerrordest"
	errorCode = "knativeerrorcode"
	errorData = "knativeerrordata"
)

const (
	minBackoff = 50 * time.Millisecond
	maxBackoff = 5 * time.Second
	// buryTimeout bounds one attempt to store dead letters.
	buryTimeout = 15 * time.Second
	// unhurried is how long a delivery may take before the next batch, which need not be full, begins beside it.
	unhurried = 100 * time.Millisecond
	// patience is for how long a POST may go on after the source was told to stop.
	patience = 10 * time.Second
)

// Deliver runs a source and delivers its events to a sink until ctx ends. What has arrived while a POST was under way
// makes the next batch, of at most so many, so that a lone event leaves at once; another POST begins beside it only with a
// full batch, or when it has taken 100 ms. It tries for as long as it takes. An event that the sink
// refuses goes to the dead letters, alone. When ctx ends, POSTs under way may end within 10 seconds, and what is not
// settled then will be delivered again.
func Deliver(ctx context.Context, src Source, sink *Sink, most int) {
	receiving, stop := context.WithCancel(context.WithoutCancel(ctx))
	var running sync.WaitGroup
	running.Go(func() { src.Run(receiving) })

	ending, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	hurry := context.AfterFunc(ctx, func() {
		select {
		case <-time.After(patience):
			end()
		case <-ending.Done():
		}
	})
	defer hurry()

	d := &delivery{src: src, sink: sink, ending: ending}
	d.sinkTrouble.log.Peer, d.deadTrouble.log.Peer = "sink "+sink.name, "dead letters"
	d.changed = make(chan struct{}, 1)
	d.dispatch(ctx, most)
	d.deliveries.Wait()
	stop()
	running.Wait()
	sink.client.CloseIdleConnections()
}

type delivery struct {
	src    Source
	sink   *Sink
	ending context.Context // of POSTs that are under way when the source is told to stop

	deliveries sync.WaitGroup
	active     atomic.Int32  // batches under way
	slow       atomic.Int32  // of them, those that have taken longer than unhurried
	changed    chan struct{} // holds a token when either number has

	sinkTrouble, deadTrouble trouble
}

// dispatch takes batches and has them delivered until ctx ends.
func (d *delivery) dispatch(ctx context.Context, most int) {
	for ctx.Err() == nil {
		active := d.active.Load()
		least := 1
		switch {
		case active >= posts:
			select {
			case <-d.changed:
			case <-ctx.Done():
			}
			continue
		case active > d.slow.Load():
			least = most
		}
		taking, cancel := context.WithCancel(ctx)
		watching := make(chan struct{})
		go func() { // the end of a delivery changes what is waited for
			defer close(watching)
			select {
			case <-d.changed:
				cancel()
			case <-taking.Done():
			}
		}()
		batch := d.src.Take(taking, least, most)
		cancel()
		<-watching // it must not take what the next round waits for
		if len(batch) > 0 {
			d.active.Add(1)
			d.deliveries.Go(func() { d.run(ctx, batch) })
		}
	}
}

// run delivers a batch and keeps the numbers by which dispatch goes.
func (d *delivery) run(ctx context.Context, batch []Event) {
	change := func() {
		select {
		case d.changed <- struct{}{}:
		default:
		}
	}
	watch := time.AfterFunc(unhurried, func() {
		d.slow.Add(1)
		change()
	})
	d.deliver(ctx, batch)
	if !watch.Stop() {
		d.slow.Add(-1)
	}
	d.active.Add(-1)
	change()
}

// letter is an event that is refused.
type letter struct {
	Event
	answer *answer
}

// deliver delivers a batch, or returns when ctx has ended.
func (d *delivery) deliver(ctx context.Context, batch []Event) {
	var dead []letter
	readable := make([]Event, 0, len(batch))
	for _, e := range batch {
		if e.Unreadable == nil {
			readable = append(readable, e)
			continue
		}
		dead = append(dead, letter{e, &answer{status: http.StatusUnprocessableEntity, reason: clean(e.Unreadable.Error())}})
	}
	dead = d.send(ctx, readable, dead)
	if len(dead) > 0 {
		d.bury(ctx, dead)
	}
}

// send delivers events and settles them; those that are refused it appends to dead.
func (d *delivery) send(ctx context.Context, batch []Event, dead []letter) []letter {
	for len(batch) > 0 {
		a := d.post(ctx, batch)
		switch {
		case a == nil:
			return dead
		case a.taken():
			d.src.Settle(batch)
			return dead
		case len(batch) == 1:
			return append(dead, letter{batch[0], a})
		case a.index >= 0 && a.index < len(batch):
			dead = append(dead, letter{batch[a.index], a})
			batch = slices.Delete(slices.Clone(batch), a.index, a.index+1)
		default:
			half := len(batch) / 2
			dead = d.send(ctx, batch[:half], dead)
			batch = batch[half:]
		}
	}
	return dead
}

// post sends a batch until it is taken or refused. It returns nil if ctx ended before.
func (d *delivery) post(ctx context.Context, batch []Event) *answer {
	mediaType, body := batchMediaType, d.sink.body(batch)
	var wait backoff
	for {
		a, err := d.sink.post(d.ending, mediaType, body)
		if err == nil && (a.taken() || a.refused()) {
			if a.status == http.StatusUnsupportedMediaType && len(batch) == 1 && mediaType == batchMediaType {
				// A sink that knows no batches may still take an event.
				mediaType, body = eventMediaType, d.sink.override(batch[0].JSON)
				continue
			}
			d.sinkTrouble.over(&wait)
			return a
		}
		var after time.Duration
		if err == nil {
			err, after = a, a.retryAfter
		}
		d.sinkTrouble.begins(&wait, err)
		if !wait.pause(ctx, after) {
			return nil
		}
	}
}

// bury stores dead letters and settles their events, or returns when ctx has ended.
func (d *delivery) bury(ctx context.Context, dead []letter) {
	letters := make([]event.Event, len(dead))
	done := make([]Event, len(dead))
	for i, l := range dead {
		letters[i], done[i] = d.mark(l), l.Event
	}
	var wait backoff
	for {
		trying, cancel := context.WithTimeout(d.ending, buryTimeout)
		err := d.src.Bury(trying, letters)
		cancel()
		if err == nil {
			d.deadTrouble.over(&wait)
			break
		}
		d.deadTrouble.begins(&wait, err)
		if !wait.pause(ctx, 0) {
			return
		}
	}
	d.src.Settle(done)
	slog.Warn("put into the dead letters", "events", len(dead), "first", letters[0].ID(), "reason", dead[0].answer.Error())
}

// mark adds the reason to an event.
func (d *delivery) mark(l letter) event.Event {
	e := events.Recover(l.JSON)
	e.SetExtension(errorDest, d.sink.name)
	e.SetExtension(errorCode, strconv.Itoa(l.answer.status))
	e.SetExtension(errorData, l.answer.reason)
	return e
}

// backoff waits longer each time.
type backoff struct {
	last    time.Duration
	counted bool // by a trouble
}

// pause waits, at least for after, and reports false if ctx ended before.
func (b *backoff) pause(ctx context.Context, after time.Duration) bool {
	b.last = min(max(2*b.last, minBackoff), maxBackoff)
	timer := time.NewTimer(max(b.last/2+rand.N(b.last), after+rand.N(minBackoff)))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-timer.C:
		return ctx.Err() == nil
	}
}

// trouble tells the log when something begins to fail, and when nothing is left of that.
type trouble struct {
	log peer.Log

	mu      sync.Mutex
	waiting int
}

func (t *trouble) begins(b *backoff, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.log.Away(err)
	if !b.counted {
		b.counted = true
		t.waiting++
	}
}

func (t *trouble) over(b *backoff) {
	if !b.counted {
		return
	}
	b.counted = false
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.waiting--; t.waiting == 0 {
		t.log.Back()
	}
}

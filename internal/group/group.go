// Package group gathers what arrives while earlier work is under way and commits it together: on an idle system a lone
// item is committed at once, under load batches grow by themselves.
package group

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"
)

// ErrFull is the answer when too much waits already: nothing was taken, and trying again later is right.
var ErrFull = errors.New("too much is waiting already")

// ErrClosed is the answer after Close: nothing was taken.
var ErrClosed = errors.New("closed")

// Options bound a Committer. All numbers must be above 0, but for Bytes.
type Options[T any] struct {
	// Commit does the work for a batch. An error is the answer to every caller in it.
	Commit func(ctx context.Context, batch []T) error
	// Batch is the most items in one batch, but for a single call that brings more.
	Batch int
	// Bytes is the most bytes in one batch by Size, with the same exception; 0 is no bound.
	Bytes int
	Size  func(T) int
	// InFlight is the most batches under way at once. While one is, another begins only when it is full, of Batch items or
	// Bytes bytes, or when the one under way has taken 100 ms: what a batch costs by itself is paid seldom under a light
	// load, no time is lost under a heavy one, and one that hangs holds nobody up.
	InFlight int
	// Linger is the longest that a batch waits for the callers of the batch just committed: those who have their answer
	// tend to come again at once, and the first to do so would be alone in its batch. A batch waits only until
	// three quarters as many items are there, only a quarter of the time that a Commit takes, and not at all when
	// the last batch was of one call or is longer ago than a Commit takes: nothing on an idle system waits. 0 is never.
	Linger time.Duration
	// Waiting is the most items that wait for a batch, but for a single call that brings more when none waits.
	Waiting int
	// Timeout bounds one Commit.
	Timeout time.Duration
	// Alone tells of an error whether it may be the fault of one caller's items. Then the callers of the batch are
	// committed one by one, and only the one at fault gets it. Nil means that no error is.
	Alone func(error) bool
}

// Committer commits items in batches. Its methods may be called at the same time.
type Committer[T any] struct {
	options Options[T]

	mu      sync.Mutex
	queue   []*call[T]
	waiting int // items in queue
	bytes   int // of them, by Size
	running int // batches under way
	slow    int // of them, those that have taken longer than patience
	closed  bool
	idle    *sync.Cond

	// Of the batch committed last.
	last struct {
		size int // items, 1 if they were one call's
		took time.Duration
		end  time.Time
	}
	enough  int           // items for which a batch waits, 0 while none does
	reached chan struct{} // of enough
}

type call[T any] struct {
	items []T
	bytes int
	done  chan error // buffered
}

// New returns a Committer.
func New[T any](options Options[T]) *Committer[T] {
	c := &Committer[T]{options: options, reached: make(chan struct{}, 1)}
	c.idle = sync.NewCond(&c.mu)
	return c
}

// Commit returns when the batch that the items went into is committed, with its error. The items of one call stay
// together. When ctx ends first, its error is returned, and the items may still be committed if that had begun.
func (c *Committer[T]) Commit(ctx context.Context, items ...T) error {
	if len(items) == 0 {
		return nil
	}
	mine := &call[T]{items: items, done: make(chan error, 1)}
	if c.options.Bytes > 0 {
		for _, item := range items {
			mine.bytes += c.options.Size(item)
		}
	}
	c.mu.Lock()
	switch {
	case c.closed:
		c.mu.Unlock()
		return ErrClosed
	case c.waiting > 0 && c.waiting+len(items) > c.options.Waiting:
		c.mu.Unlock()
		return ErrFull
	}
	c.queue = append(c.queue, mine)
	c.waiting += len(items)
	c.bytes += mine.bytes
	c.startNext()
	if c.enough > 0 && c.waiting >= c.enough {
		c.enough = 0
		c.reached <- struct{}{}
	}
	c.mu.Unlock()

	select {
	case err := <-mine.done:
		return err
	case <-ctx.Done():
		c.withdraw(mine)
		return ctx.Err()
	}
}

// patience is how long a batch may take before the next one begins beside it.
const patience = 100 * time.Millisecond

// startNext starts a runner if there may be one more and there is work for it.
func (c *Committer[T]) startNext() {
	if c.running < c.options.InFlight && (c.running == c.slow || c.full()) {
		c.running++
		go c.run()
	}
}

// full reports whether what waits is a full batch.
func (c *Committer[T]) full() bool {
	return c.waiting >= c.options.Batch || c.options.Bytes > 0 && c.bytes >= c.options.Bytes
}

// withdraw takes back a call that no batch has taken yet.
func (c *Committer[T]) withdraw(mine *call[T]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, other := range c.queue {
		if other == mine {
			c.queue = slices.Delete(c.queue, i, i+1)
			c.waiting -= len(mine.items)
			c.bytes -= mine.bytes
			return
		}
	}
}

// Close waits until all that has been taken is committed. Afterwards nothing more is taken.
func (c *Committer[T]) Close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for c.running > 0 {
		c.idle.Wait()
	}
}

// run commits batches until nothing waits.
func (c *Committer[T]) run() {
	for {
		calls := c.take()
		if calls == nil {
			return
		}
		batch := calls[0].items
		if len(calls) > 1 {
			batch = nil
			for _, call := range calls {
				batch = append(batch, call.items...)
			}
		}
		start := time.Now()
		ended := c.watch()
		err := c.commit(batch)
		ended()
		c.note(len(calls), len(batch), start)
		if err != nil && len(calls) > 1 && c.options.Alone != nil && c.options.Alone(err) {
			for _, call := range calls {
				call.done <- c.commit(call.items)
			}
			continue
		}
		for _, call := range calls {
			call.done <- err
		}
	}
}

// watch lets others begin beside the batch that begins now, should it take longer than patience.
func (c *Committer[T]) watch() (ended func()) {
	over, slow := false, false
	timer := time.AfterFunc(patience, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		if over {
			return
		}
		slow = true
		c.slow++
		if len(c.queue) > 0 {
			c.startNext()
		}
	})
	return func() {
		timer.Stop()
		c.mu.Lock()
		defer c.mu.Unlock()
		over = true
		if slow {
			c.slow--
		}
	}
}

func (c *Committer[T]) commit(batch []T) error {
	ctx, cancel := context.WithTimeout(context.Background(), c.options.Timeout)
	defer cancel()
	return c.options.Commit(ctx, batch)
}

// note keeps what Linger goes by.
func (c *Committer[T]) note(calls, size int, start time.Time) {
	if calls == 1 {
		size = 1
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.last.size, c.last.end = size, time.Now()
	c.last.took = c.last.end.Sub(start)
}

// gather waits for the callers of the last batch, as Linger says. It is called with the lock held, and lets it go
// meanwhile.
func (c *Committer[T]) gather() {
	enough := min(c.last.size, c.options.Batch) * 3 / 4
	if c.waiting >= enough || time.Since(c.last.end) > c.last.took {
		return
	}
	wait := time.NewTimer(min(c.options.Linger, c.last.took/4))
	defer wait.Stop()
	c.enough = enough
	c.mu.Unlock()
	select {
	case <-c.reached:
		c.mu.Lock()
	case <-wait.C:
		c.mu.Lock()
		if c.enough == 0 { // reached in the same moment
			<-c.reached
		}
		c.enough = 0
	}
}

// take takes the calls of the next batch from the queue, or ends this runner.
func (c *Committer[T]) take() []*call[T] {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.running-c.slow == 1 && c.options.Linger > 0 && len(c.queue) > 0 {
		c.gather()
	}
	if len(c.queue) == 0 || c.running-c.slow > 1 && !c.full() { // nothing is left, or another will take it
		c.running--
		if c.running == 0 {
			c.idle.Broadcast()
		}
		return nil
	}
	n, size, bytes := 1, len(c.queue[0].items), c.queue[0].bytes
	for ; n < len(c.queue); n++ {
		next := c.queue[n]
		if size+len(next.items) > c.options.Batch || c.options.Bytes > 0 && bytes+next.bytes > c.options.Bytes {
			break
		}
		size += len(next.items)
		bytes += next.bytes
	}
	calls := slices.Clone(c.queue[:n])
	c.queue = slices.Delete(c.queue, 0, n) // which forgets them
	c.waiting -= size
	c.bytes -= bytes
	if len(c.queue) > 0 {
		c.startNext()
	}
	return calls
}

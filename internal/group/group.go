// Package group gathers what arrives while earlier work is under way and commits it together. Nothing waits for a
// timer: on an idle system a lone item is committed at once, under load batches grow by themselves.
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
	// InFlight is the most batches under way at once.
	InFlight int
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
	running int // batches under way
	closed  bool
	idle    *sync.Cond
}

type call[T any] struct {
	items []T
	bytes int
	done  chan error // buffered
}

// New returns a Committer.
func New[T any](options Options[T]) *Committer[T] {
	c := &Committer[T]{options: options}
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
	if c.running < c.options.InFlight {
		c.running++
		go c.run()
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

// withdraw takes back a call that no batch has taken yet.
func (c *Committer[T]) withdraw(mine *call[T]) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for i, other := range c.queue {
		if other == mine {
			c.queue = slices.Delete(c.queue, i, i+1)
			c.waiting -= len(mine.items)
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
		err := c.commit(batch)
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

func (c *Committer[T]) commit(batch []T) error {
	ctx, cancel := context.WithTimeout(context.Background(), c.options.Timeout)
	defer cancel()
	return c.options.Commit(ctx, batch)
}

// take takes the calls of the next batch from the queue, or ends this runner.
func (c *Committer[T]) take() []*call[T] {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.queue) == 0 {
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
	return calls
}

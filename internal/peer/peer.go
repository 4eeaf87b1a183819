// Package peer keeps what a program needs of another one that comes and goes.
package peer

import (
	"context"
	"math/rand/v2"
	"time"
)

const (
	minBackoff = 50 * time.Millisecond
	maxBackoff = time.Second
)

// Keep calls use again and again until ctx ends, waiting longer after each time that it failed at once. It tells a Log when
// what is used goes away and when it is back: use calls up as soon as it works.
func Keep(ctx context.Context, what string, use func(ctx context.Context, up func()) error) {
	log := Log{Peer: what}
	backoff := minBackoff
	for {
		err := use(ctx, func() {
			backoff = minBackoff
			log.Back()
		})
		if ctx.Err() != nil {
			return
		}
		log.Away(err)
		select {
		case <-ctx.Done():
			return
		case <-time.After(backoff/2 + rand.N(backoff)):
		}
		backoff = min(2*backoff, maxBackoff)
	}
}

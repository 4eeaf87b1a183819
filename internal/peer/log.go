package peer

import (
	"log/slog"
	"strings"
	"sync"
	"time"
	"unicode"
)

// remind is after how long the log is told again that a peer is away.
const remind = 30 * time.Second

// Log tells in the program's log how a peer does. It has nothing to say of a peer that works from the start. Its methods
// may be called at the same time.
type Log struct {
	Peer string

	mu    sync.Mutex
	err   error // nil while it is there
	since time.Time
	told  map[string]bool // since reset
	reset time.Time
}

// Away says that the peer is away, and why. It is to be called at each attempt that fails: another reason than the last
// ones is said too, and the same one again every 30 s.
func (l *Log) Away(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	first := l.err == nil
	l.err = err
	if first {
		l.since = now
	}
	if first || now.Sub(l.reset) >= remind {
		l.told, l.reset = map[string]bool{}, now
	}
	reason := strings.Map(letters, err.Error())
	if l.told[reason] {
		return
	}
	l.told[reason] = true
	if first {
		slog.Warn("is away, trying again until it is back", "peer", l.Peer, "error", err)
		return
	}
	slog.Warn("is still away", "peer", l.Peer, "for", now.Sub(l.since).Round(time.Millisecond), "error", err)
}

// letters drops digits: a reason is not another one for the ports and times in it.
func letters(r rune) rune {
	if unicode.IsDigit(r) {
		return -1
	}
	return r
}

// Back says that the peer is there, if it was away.
func (l *Log) Back() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err != nil {
		slog.Info("is back", "peer", l.Peer, "after", time.Since(l.since).Round(time.Millisecond))
	}
	l.err = nil
}

// Err returns why the peer is away, or nil.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

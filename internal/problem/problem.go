// Package problem writes problem documents (RFC 9457), the one form in which an error leaves a program over HTTP.
package problem

import (
	"encoding/json"
	"net/http"
	"strconv"
	"time"
)

// Details is a problem document. Its type is about:blank: the status and the title say what kind of problem it is.
type Details struct {
	Status     int            // HTTP status code
	Detail     string         // what was wrong with this request, and what would be right
	Members    map[string]any // extension members
	RetryAfter time.Duration  // when to try again; sent in whole seconds, rounded up, unless it is 0
}

// Write answers with the problem.
func Write(w http.ResponseWriter, p Details) {
	document := map[string]any{"type": "about:blank", "title": http.StatusText(p.Status), "status": p.Status}
	if p.Detail != "" {
		document["detail"] = p.Detail
	}
	for name, value := range p.Members {
		document[name] = value
	}
	body, err := json.Marshal(document)
	if err != nil {
		panic(err) // a member that is no JSON is a mistake in the code
	}
	h := w.Header()
	h.Set("Content-Type", "application/problem+json")
	h.Set("X-Content-Type-Options", "nosniff")
	if p.RetryAfter > 0 {
		h.Set("Retry-After", strconv.Itoa(int((p.RetryAfter+time.Second-1)/time.Second)))
	}
	w.WriteHeader(p.Status)
	_, _ = w.Write(append(body, '\n')) // the client has gone, if this fails
}

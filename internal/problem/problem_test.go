package problem

import (
	"encoding/json"
	"net/http/httptest"
	"reflect"
	"testing"
	"time"
)

func TestWrite(t *testing.T) {
	for _, c := range []struct {
		name       string
		details    Details
		want       map[string]any
		retryAfter string
	}{
		{"a status alone", Details{Status: 404}, map[string]any{"type": "about:blank", "title": "Not Found", "status": 404.0}, ""},
		{
			"a detail and members",
			Details{Status: 422, Detail: "x\xff", Members: map[string]any{"index": 7}},
			map[string]any{"type": "about:blank", "title": "Unprocessable Entity", "status": 422.0, "detail": "x\ufffd", "index": 7.0},
			"",
		},
		{"a time to wait, rounded up to seconds", Details{Status: 503, RetryAfter: 1001 * time.Millisecond}, map[string]any{"type": "about:blank", "title": "Service Unavailable", "status": 503.0}, "2"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := httptest.NewRecorder()
			Write(w, c.details)
			var got map[string]any
			if err := json.Unmarshal(w.Body.Bytes(), &got); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(got, c.want) || w.Code != c.details.Status {
				t.Errorf("%d %v", w.Code, got)
			}
			h := w.Header()
			if h.Get("Content-Type") != "application/problem+json" || h.Get("X-Content-Type-Options") != "nosniff" || h.Get("Retry-After") != c.retryAfter {
				t.Errorf("headers %v", h)
			}
		})
	}
}

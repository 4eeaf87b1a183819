package source

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/cloudevents/sdk-go/v2/event"

	"isobar.dev/events"
)

// SinkSettings are those that Knative's ContainerSource injects.
type SinkSettings struct {
	Sink      string `env:"K_SINK,required,notEmpty"`
	Overrides string `env:"K_CE_OVERRIDES"` // {"extensions":{"NAME":"VALUE"}}, added to every event
	CACerts   string `env:"K_CA_CERTS"`     // PEM, besides the system's
}

const (
	// postTimeout bounds one POST, answer included.
	postTimeout = 30 * time.Second
	// posts is how many are under way at once.
	posts = 3

	maxAnswer = 64 << 10
	maxReason = 1024
	// maxRetryAfter bounds for how long a sink can ask to be left alone.
	maxRetryAfter = 30 * time.Second

	batchMediaType = event.ApplicationCloudEventsBatchJSON
	eventMediaType = event.ApplicationCloudEventsJSON
)

// Sink is where events go: an HTTP address that takes CloudEvents.
type Sink struct {
	url        string
	name       string // the URL without a password
	extensions map[string]string
	client     *http.Client
}

// NewSink checks the settings; its error names the one that is wrong.
func NewSink(s SinkSettings) (*Sink, error) {
	u, err := url.Parse(s.Sink)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("K_SINK must be an http or https URL, not %q", s.Sink)
	}
	sink := &Sink{url: s.Sink, name: u.Redacted()}
	if s.Overrides != "" {
		var overrides struct {
			Extensions map[string]string `json:"extensions"`
		}
		if err := json.Unmarshal([]byte(s.Overrides), &overrides); err != nil {
			return nil, fmt.Errorf(`K_CE_OVERRIDES must be JSON like {"extensions":{"name":"value"}}: %w`, err)
		}
		for name, value := range overrides.Extensions {
			var probe event.EventContextV1
			if err := probe.SetExtension(name, value); err != nil || name != strings.ToLower(name) || name == "data" {
				return nil, fmt.Errorf("K_CE_OVERRIDES: %q can't be the name of an extension", name)
			}
		}
		sink.extensions = overrides.Extensions
	}
	transport := &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 15 * time.Second}).DialContext,
		TLSHandshakeTimeout:   5 * time.Second,
		MaxIdleConnsPerHost:   posts,
		IdleConnTimeout:       90 * time.Second,
		DisableCompression:    true,
		WriteBufferSize:       64 << 10,
		ExpectContinueTimeout: time.Second,
	}
	if s.CACerts != "" {
		roots, err := x509.SystemCertPool()
		if err != nil {
			roots = x509.NewCertPool()
		}
		if !roots.AppendCertsFromPEM([]byte(s.CACerts)) {
			return nil, errors.New("K_CA_CERTS holds no certificate in PEM")
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: roots}
	}
	sink.client = &http.Client{
		Transport:     transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return sink, nil
}

// answer is what a sink said to a POST.
type answer struct {
	status     int
	reason     string        // for a person; bounded
	index      int           // of the event that it is about; -1 if it does not say
	retryAfter time.Duration // 0 if it does not say
}

func (a *answer) Error() string { return fmt.Sprintf("%d: %s", a.status, a.reason) }

// taken reports whether the sink has the events.
func (a *answer) taken() bool { return a.status >= 200 && a.status < 300 }

// refused reports whether the answer is about the events: that they can never be taken as they are. Everything else
// may pass, even a 404: just after a Knative Service became ready its ingress may not know it yet.
func (a *answer) refused() bool {
	switch a.status {
	case http.StatusBadRequest, http.StatusRequestEntityTooLarge, http.StatusUnsupportedMediaType, http.StatusUnprocessableEntity:
		return true
	}
	return false
}

// body makes a batch of events.
func (s *Sink) body(batch []Event) []byte {
	size := 2
	for _, e := range batch {
		size += len(e.JSON) + 1
	}
	b := append(make([]byte, 0, size), '[')
	for i, e := range batch {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(b, s.override(e.JSON)...)
	}
	return append(b, ']')
}

func (s *Sink) override(data []byte) []byte {
	if len(s.extensions) == 0 {
		return data
	}
	if extended, err := events.Extend(data, s.extensions); err == nil {
		return extended
	}
	return data // an event beyond our limits: the sink will say so
}

// post sends once. The error is that of the connection, or of ctx.
func (s *Sink) post(ctx context.Context, mediaType string, body []byte) (*answer, error) {
	ctx, cancel := context.WithTimeout(ctx, postTimeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url, bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	request.Header.Set("Content-Type", mediaType)
	request.Header.Set("User-Agent", "isobar-source")
	response, err := s.client.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close()
	said, _ := io.ReadAll(io.LimitReader(response.Body, maxAnswer)) // the status is what counts
	a := &answer{status: response.StatusCode, index: -1}
	if a.taken() {
		return a, nil
	}
	a.retryAfter = retryAfter(response.Header.Get("Retry-After"), time.Now())
	mediaType, _, _ = mime.ParseMediaType(response.Header.Get("Content-Type"))
	a.read(mediaType, said)
	return a, nil
}

func (a *answer) read(mediaType string, said []byte) {
	if a.reason = clean(string(said)); a.reason == "" {
		a.reason = http.StatusText(a.status)
	}
	if mediaType != "application/problem+json" {
		return
	}
	var problem struct {
		Title  string `json:"title"`
		Detail string `json:"detail"`
		Index  *int   `json:"index"`
	}
	if json.Unmarshal(said, &problem) != nil {
		return
	}
	switch {
	case problem.Detail != "":
		a.reason = clean(problem.Detail)
	case problem.Title != "":
		a.reason = clean(problem.Title)
	}
	if problem.Index != nil && *problem.Index >= 0 {
		a.index = *problem.Index
	}
}

// clean makes a text fit for an attribute: valid, of one line, bounded.
func clean(text string) string {
	text = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, "\uFFFD"))
	text = strings.TrimSpace(text)
	if len(text) > maxReason {
		text = strings.ToValidUTF8(text[:maxReason], "")
	}
	return text
}

// retryAfter reads the header in either of its forms.
func retryAfter(header string, now time.Time) time.Duration {
	var after time.Duration
	if seconds, err := strconv.Atoi(header); err == nil {
		after = time.Duration(min(seconds, 3600)) * time.Second
	} else if at, err := http.ParseTime(header); err == nil {
		after = at.Sub(now)
	}
	return min(max(after, 0), maxRetryAfter)
}

package api

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"go.yaml.in/yaml/v3"

	"isobar.dev/events"
)

const (
	gt       = `{"description":"Test","country":"GT","weather":"Sunny"}`
	envelope = `{"specversion":"1.0","id":"a","source":"/app","type":"dev.isobar.weather.report.v1","data":` + gt + `}`
)

// taken records what is published; fail, if set, is the answer.
type taken struct {
	mu   sync.Mutex
	ids  []string
	fail error
}

func (p *taken) publish(_ context.Context, reports []event.Event) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.fail != nil {
		return p.fail
	}
	for i := range reports {
		p.ids = append(p.ids, reports[i].Source()+" "+reports[i].ID())
	}
	return nil
}

func (p *taken) take() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	ids := p.ids
	p.ids = nil
	return ids
}

// start starts the handler on a real server, which takes HTTP/1.1 and h2c.
func start(t *testing.T) (*httptest.Server, *taken) {
	t.Helper()
	p := new(taken)
	s := httptest.NewUnstartedServer(Handler(p.publish))
	s.Config.Protocols = new(http.Protocols)
	s.Config.Protocols.SetHTTP1(true)
	s.Config.Protocols.SetUnencryptedHTTP2(true)
	s.Start()
	t.Cleanup(s.Close)
	return s, p
}

type answer struct {
	*http.Response
	body []byte
}

func do(t *testing.T, client *http.Client, r *http.Request) answer {
	t.Helper()
	response, err := client.Do(r)
	if err != nil {
		t.Error(err)
		return answer{Response: new(http.Response)}
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Error(err)
	}
	return answer{response, body}
}

func post(t *testing.T, url string, body io.Reader, headers ...string) *http.Request {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, body)
	if err != nil {
		t.Fatal(err)
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Add(headers[i], headers[i+1])
	}
	return r
}

func in(contentType string, more ...string) []string {
	return append([]string{"Content-Type", contentType}, more...)
}

var (
	plain      = in("application/json")
	structured = in("application/cloudevents+json")
	batch      = in("application/cloudevents-batch+json")
	binary     = in("application/json", "Ce-Specversion", "1.0", "Ce-Id", "a", "Ce-Source", "/app", "Ce-Type", events.Type)
)

func with(headers []string, name, value string) []string {
	headers = slices.Clone(headers)
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == name {
			headers = slices.Delete(headers, i, i+2)
			break
		}
	}
	if value == "" {
		return headers
	}
	return append(headers, name, value)
}

func without(member string) string { return strings.Replace(envelope, member, "", 1) }

// badCases are requests that are refused; field and index are those of a 422.
var badCases = []struct {
	name         string
	method, path string // POST /reports where empty
	headers      []string
	body         string
	status       int
	says         string
	field        string
	index        any
}{
	{name: "an empty body", headers: plain, status: 400, says: "empty"},
	{name: "white space", headers: plain, body: " \n", status: 400, says: "empty"},
	{name: "no JSON", headers: plain, body: "country=GT", status: 400, says: "invalid character"},
	{name: "an object that does not end", headers: plain, body: gt[:20], status: 400, says: "ends too early"},
	{name: "an array that does not end", headers: plain, body: "[" + gt + ",", status: 400, says: "ends too early", index: 1.0},
	{name: "two reports without an array", headers: plain, body: gt + gt, status: 400, says: "after"},
	{name: "single quotes", headers: plain, body: `{'country':'GT'}`, status: 400, says: "invalid character"},
	{name: "a comma too many", headers: plain, body: "[" + gt + ",]", status: 400, says: "invalid character", index: 1.0},
	{name: "a name twice", headers: plain, body: `{"country":"GT","country":"ES","weather":"x"}`, status: 400, says: "duplicate"},
	{name: "no UTF-8", headers: plain, body: "{\"country\":\"GT\",\"weather\":\"\xff\"}", status: 400, says: "UTF-8"},
	{name: "UTF-16", headers: plain, body: "\xff\xfe{\x00}\x00", status: 400, says: "invalid"},
	{name: "a byte order mark", headers: plain, body: "\xef\xbb\xbf" + gt, status: 400, says: "invalid character"},
	{name: "nested deeper than anyone needs", headers: plain, body: strings.Repeat("[", 200_000), status: 400, says: "depth", index: 0.0},
	{name: "NaN", headers: plain, body: `{"country":"GT","weather":NaN}`, status: 400, says: "invalid character"},
	{name: "broken in the middle of an array", headers: plain, body: "[" + gt + `,{"country"},` + gt + "]", status: 400, says: "element 1", index: 1.0},
	{name: "gzip that was not said", headers: plain, body: "\x1f\x8b\x08\x00", status: 400, says: "invalid character"},

	{name: "no country", headers: plain, body: `{"weather":"Sunny"}`, status: 422, says: "is missing", field: "country"},
	{name: "no weather", headers: plain, body: `{"country":"GT"}`, status: 422, says: "is missing", field: "weather"},
	{name: "a country that is none", headers: plain, body: `{"country":"XX","weather":"x"}`, status: 422, says: `like GT or ESP, not "XX"`, field: "country"},
	{name: "a country that is a number", headers: plain, body: `{"country":320,"weather":"x"}`, status: 422, says: "not 320", field: "country"},
	{name: "a country that is null", headers: plain, body: `{"country":null,"weather":"x"}`, status: 422, says: "not null", field: "country"},
	{name: "a country of a megabyte", headers: plain, body: `{"country":"` + strings.Repeat("G", 1<<20-40) + `","weather":"x"}`, status: 422, says: "…", field: "country"},
	{name: "an empty weather", headers: plain, body: `{"country":"GT","weather":""}`, status: 422, says: "1 to 64 bytes", field: "weather"},
	{name: "weather of 65 bytes", headers: plain, body: `{"country":"GT","weather":"` + strings.Repeat("x", 65) + `"}`, status: 422, says: "1 to 64 bytes", field: "weather"},
	{name: "weather that is an object", headers: plain, body: `{"country":"GT","weather":{}}`, status: 422, says: "not {}", field: "weather"},
	{name: "a description of 1025 bytes", headers: plain, body: `{"country":"GT","weather":"x","description":"` + strings.Repeat("x", 1025) + `"}`, status: 422, says: "1024", field: "description"},
	{name: "a description that is null", headers: plain, body: `{"country":"GT","weather":"x","description":null}`, status: 422, says: "not null", field: "description"},
	{name: "a report that is a string", headers: plain, body: `"GT"`, status: 422, says: "JSON object"},
	{name: "a report that is null", headers: plain, body: `null`, status: 422, says: "JSON object"},
	{name: "an empty array", headers: plain, body: `[]`, status: 422, says: "at least one"},
	{name: "an array in an array", headers: plain, body: "[[" + gt + "]]", status: 422, says: "JSON object", index: 0.0},
	{name: "the last of many breaks a rule", headers: plain, body: "[" + strings.Repeat(gt+",", 999) + `{"country":"XX","weather":"x"}]`, status: 422, says: "element 999", field: "country", index: 999.0},
	{name: "1001 reports", headers: plain, body: "[" + strings.Repeat(gt+",", 1000) + gt + "]", status: 413, says: "at most 1000 reports, not 1001"},
	{name: "1001 reports, of which one breaks a rule", headers: plain, body: "[" + strings.Repeat(gt+",", 1000) + "{}]", status: 413, says: "at most 1000 reports"},
	{name: "1 MiB and a byte", headers: plain, body: gt + strings.Repeat(" ", 1<<20+1-len(gt)), status: 413, says: "at most 1048576 bytes"},

	{name: "an empty key", headers: in("application/json", "Idempotency-Key", ""), body: gt, status: 422, says: "must be one string", field: "Idempotency-Key"},
	{name: "a key of 253 bytes", headers: in("application/json", "Idempotency-Key", strings.Repeat("k", 253)), body: gt, status: 422, says: "1 to 252", field: "Idempotency-Key"},
	{name: "two keys", headers: in("application/json", "Idempotency-Key", "a", "Idempotency-Key", "b"), body: gt, status: 422, says: "one string", field: "Idempotency-Key"},
	{name: "a key that is not ASCII", headers: in("application/json", "Idempotency-Key", "ä\xff"), body: gt, status: 422, says: "ASCII", field: "Idempotency-Key"},
	{name: "a key that does not end", headers: in("application/json", "Idempotency-Key", `"k`), body: gt, status: 422, says: "must be one string", field: "Idempotency-Key"},

	{name: "no content type", body: gt, status: 415, says: "not none"},
	{name: "curl's default content type", headers: in("application/x-www-form-urlencoded"), body: gt, status: 415, says: "must be application/json"},
	{name: "text", headers: in("text/plain"), body: gt, status: 415, says: "not text/plain"},
	{name: "XML", headers: in("application/xml"), body: "<report/>", status: 415, says: "not application/xml"},
	{name: "another charset", headers: in("application/json; charset=utf-16"), body: gt, status: 415, says: "UTF-8"},
	{name: "compressed", headers: in("application/json", "Content-Encoding", "gzip"), body: "\x1f\x8b", status: 415, says: "content encoding gzip"},
	{name: "CloudEvents in Avro", headers: in("application/cloudevents+avro"), body: "x", status: 415, says: "not application/cloudevents+avro"},
	{name: "a content type that is none", headers: in("json; ="), body: gt, status: 415, says: "not json; ="},

	{name: "binary: no version", headers: with(binary, "Ce-Specversion", ""), body: gt, status: 400, says: "no ce-specversion"},
	{name: "binary: an older version", headers: with(binary, "Ce-Specversion", "0.3"), body: gt, status: 422, says: `must be "1.0"`, field: "specversion"},
	{name: "binary: no id", headers: with(binary, "Ce-Id", ""), body: gt, status: 422, says: "is missing", field: "id"},
	{name: "binary: no source", headers: with(binary, "Ce-Source", ""), body: gt, status: 422, says: "is missing", field: "source"},
	{name: "binary: no type", headers: with(binary, "Ce-Type", ""), body: gt, status: 422, says: "is missing", field: "type"},
	{name: "binary: another type", headers: with(binary, "Ce-Type", "com.example"), body: gt, status: 422, says: "must be", field: "type"},
	{name: "binary: an id of 257 bytes", headers: with(binary, "Ce-Id", strings.Repeat("i", 257)), body: gt, status: 422, says: "1 to 256", field: "id"},
	{name: "binary: an id twice", headers: append(slices.Clone(binary), "Ce-Id", "b"), body: gt, status: 422, says: "stand once", field: "ce-id"},
	{name: "binary: an id that is not UTF-8", headers: with(binary, "Ce-Id", "%ff"), body: gt, status: 422, says: "UTF-8", field: "ce-id"},
	{name: "binary: a source that is no URI", headers: with(binary, "Ce-Source", "http://[::1"), body: gt, status: 422, says: "URI reference", field: "source"},
	{name: "binary: a subject that is not the country", headers: with(binary, "Ce-Subject", "ES"), body: gt, status: 422, says: "the report's country", field: "subject"},
	{name: "binary: a time that is none", headers: with(binary, "Ce-Time", "yesterday"), body: gt, status: 422, says: "RFC 3339", field: "time"},
	{name: "binary: data that is text", headers: with(binary, "Content-Type", "text/plain"), body: gt, status: 422, says: "application/json", field: "datacontenttype"},
	{name: "binary: an extension of 64 KiB", headers: with(binary, "Ce-Long", strings.Repeat("x", 64<<10)), body: gt, status: 422, says: "65536 bytes"},
	{name: "binary: an extension with a bad name", headers: with(binary, "Ce-A-B", "x"), body: gt, status: 422, says: "no attribute name", field: "a-b"},
	{name: "binary: a body that is none", headers: binary, status: 422, says: "is missing", field: "data"},
	{name: "binary: an array", headers: binary, body: "[" + gt + "]", status: 422, says: "JSON object"},
	{name: "binary: broken data", headers: binary, body: gt[:9], status: 400, says: "ends too early"},
	{name: "binary and structured at once", headers: with(binary, "Content-Type", "application/cloudevents+json"), body: envelope, status: 400, says: "send one of them"},

	{name: "structured: an array", headers: structured, body: "[" + envelope + "]", status: 422, says: "JSON object"},
	{name: "structured: a plain report", headers: structured, body: gt, status: 400, says: "specversion is missing"},
	{name: "structured: no id", headers: structured, body: without(`"id":"a",`), status: 422, says: "is missing", field: "id"},
	{name: "structured: an id that is a number", headers: structured, body: strings.Replace(envelope, `"a"`, "7", 1), status: 422, says: "not 7", field: "id"},
	{name: "structured: a space at the id's end", headers: structured, body: strings.Replace(envelope, `"a"`, `"a "`, 1), status: 422, says: "white space", field: "id"},
	{name: "structured: no data", headers: structured, body: without(`,"data":` + gt), status: 422, says: "is missing", field: "data"},
	{name: "structured: data_base64 that is a number", headers: structured, body: strings.Replace(envelope, `"data":`+gt, `"data_base64":7`, 1), status: 422, says: "base64", field: "data_base64"},
	{name: "structured: an extension that is an array", headers: structured, body: strings.Replace(envelope, `"id"`, `"x":[],"id"`, 1), status: 422, says: "must be a string", field: "x"},
	{name: "structured: of 64 KiB", headers: structured, body: strings.Replace(envelope, `"id"`, `"x":"`+strings.Repeat("x", 64<<10)+`","id"`, 1), status: 422, says: "65536"},
	{name: "structured: broken", headers: structured, body: envelope[:50], status: 400, says: "ends too early"},
	{name: "structured: empty", headers: structured, status: 400, says: "empty"},

	{name: "batch: an object", headers: batch, body: envelope, status: 422, says: "array of CloudEvents"},
	{name: "batch: empty array", headers: batch, body: "[]", status: 422, says: "at least one"},
	{name: "batch: a plain report", headers: batch, body: "[" + envelope + "," + gt + "]", status: 400, says: "specversion is missing", index: 1.0},
	{name: "batch: one breaks a rule", headers: batch, body: "[" + envelope + "," + strings.Replace(envelope, "GT", "XX", 1) + "]", status: 422, says: "element 1", field: "country", index: 1.0},
	{name: "batch: 1001 events", headers: batch, body: "[" + strings.Repeat(envelope+",", 1000) + envelope + "]", status: 413, says: "at most 1000"},

	{name: "GET", method: "GET", headers: plain, status: 405, says: "takes POST, not GET"},
	{name: "PUT", method: "PUT", headers: plain, body: gt, status: 405, says: "takes POST, not PUT"},
	{name: "DELETE", method: "DELETE", path: "/", status: 405, says: "/ takes POST"},
	{name: "OPTIONS", method: "OPTIONS", status: 405, says: "takes POST"},
	{name: "a method nobody knows", method: "REPORT", headers: plain, body: gt, status: 405, says: "not REPORT"},
	{name: "a post to the document", path: "/openapi.yaml", headers: plain, body: gt, status: 405, says: "takes GET, HEAD, not POST"},
	{name: "another path", path: "/report", headers: plain, body: gt, status: 404, says: "POST /reports"},
	{name: "a slash too many", path: "/reports/", headers: plain, body: gt, status: 404, says: "POST /reports"},
	{name: "a path that climbs", path: "/../etc/passwd", method: "GET", status: 404, says: "POST /reports"},
}

func TestBadInput(t *testing.T) {
	s, published := start(t)
	document := openAPIDocument(t)
	for _, c := range badCases {
		t.Run(c.name, func(t *testing.T) {
			path, neighbour := c.path, make(chan answer, 1)
			if path == "" {
				path = "/reports"
			}
			r := post(t, s.URL+path, strings.NewReader(c.body), c.headers...)
			if c.method != "" {
				r.Method = c.method
			}
			good := post(t, s.URL+"/reports", strings.NewReader(gt), with(plain, "Idempotency-Key", c.name)...)
			good.Header.Set("Idempotency-Key", strings.ReplaceAll(c.name, "'", ""))
			go func() { neighbour <- do(t, s.Client(), good) }()
			got := do(t, s.Client(), r)
			if beside := <-neighbour; beside.StatusCode != http.StatusAccepted {
				t.Errorf("the neighbour is answered %d %s", beside.StatusCode, beside.body)
			}
			if ids := published.take(); len(ids) != 1 {
				t.Errorf("published beside the neighbour: %q", ids)
			}

			if got.StatusCode != c.status {
				t.Fatalf("%d, want %d: %s", got.StatusCode, c.status, got.body)
			}
			problem := checkProblem(t, got)
			if detail, _ := problem["detail"].(string); !strings.Contains(detail, c.says) || len(detail) > 500 {
				t.Errorf("the detail is %q, want %q in it", detail, c.says)
			}
			if problem["index"] != c.index {
				t.Errorf("the index is %v, want %v", problem["index"], c.index)
			}
			if field, _ := problem["field"].(string); field != c.field {
				t.Errorf("the field is %q, want %q", field, c.field)
			}
			if rule, _ := problem["rule"].(string); (rule != "") != (c.status == 422) {
				t.Errorf("the rule is %q", rule)
			}
			switch c.status {
			case 405:
				if allow := got.Header.Get("Allow"); allow == "" || !strings.Contains(c.says+problem["detail"].(string), allow) {
					t.Errorf("Allow: %q", allow)
				}
			case 415:
				if accept := got.Header.Get("Accept-Post"); !strings.Contains(accept, "application/cloudevents-batch+json") {
					t.Errorf("Accept-Post: %q", accept)
				}
				fallthrough
			case 400, 413, 422:
				document.check(t, r, got)
			}
		})
	}
	if len(badCases) < 60 {
		t.Errorf("%d cases", len(badCases))
	}
}

// checkProblem checks the form of a problem document and returns it.
func checkProblem(t *testing.T, got answer) map[string]any {
	t.Helper()
	if contentType := got.Header.Get("Content-Type"); contentType != "application/problem+json" {
		t.Errorf("the content type is %s", contentType)
	}
	var document map[string]any
	if err := json.Unmarshal(got.body, &document); err != nil {
		t.Fatalf("%v in %s", err, got.body)
	}
	if document["status"] != float64(got.StatusCode) || document["title"] != http.StatusText(got.StatusCode) || document["type"] != "about:blank" {
		t.Errorf("the document is %v, the status %d", document, got.StatusCode)
	}
	return document
}

// description is the document that the handler serves.
type description struct {
	root     map[string]any
	compiler *jsonschema.Compiler
}

func openAPIDocument(t *testing.T) *description {
	t.Helper()
	var root map[string]any
	if err := yaml.Unmarshal(openAPI, &root); err != nil {
		t.Fatal(err)
	}
	plain, err := json.Marshal(root)
	if err != nil {
		t.Fatal(err)
	}
	document, err := jsonschema.UnmarshalJSON(bytes.NewReader(plain))
	if err != nil {
		t.Fatal(err)
	}
	c := jsonschema.NewCompiler()
	if err := c.AddResource("openapi.json", document); err != nil {
		t.Fatal(err)
	}
	return &description{root, c}
}

// at follows names from an object of the document, and references.
func (d *description) at(t *testing.T, from any, names ...string) any {
	t.Helper()
	resolve := func(value any) any {
		if object, ok := value.(map[string]any); ok {
			if ref, ok := object["$ref"].(string); ok {
				return d.at(t, d.root, strings.Split(strings.TrimPrefix(ref, "#/"), "/")...)
			}
		}
		return value
	}
	for _, name := range names {
		object, _ := resolve(from).(map[string]any)
		var ok bool
		if from, ok = object[name]; !ok {
			t.Fatalf("the document has no %s in %q", name, names)
		}
	}
	return resolve(from)
}

// check fails unless the document describes the answer: status, content type and schema.
func (d *description) check(t *testing.T, r *http.Request, got answer) {
	t.Helper()
	operation := d.at(t, d.root, "paths", r.URL.Path, strings.ToLower(r.Method), "responses", fmt.Sprint(got.StatusCode))
	schema := d.at(t, operation, "content", got.Header.Get("Content-Type")).(map[string]any)["schema"].(map[string]any)
	ref, ok := schema["$ref"].(string)
	if !ok {
		return
	}
	compiled, err := d.compiler.Compile("openapi.json" + ref)
	if err != nil {
		t.Fatal(err)
	}
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(got.body))
	if err == nil {
		err = compiled.Validate(value)
	}
	if err != nil {
		t.Errorf("the answer is not what the document says: %v\n%s", err, got.body)
	}
}

func identitiesOf(t *testing.T, got answer) []string {
	t.Helper()
	var document struct{ Reports []struct{ Source, ID string } }
	if err := json.Unmarshal(got.body, &document); err != nil {
		t.Errorf("%v in %s", err, got.body)
	}
	var all []string
	for _, r := range document.Reports {
		all = append(all, r.Source+" "+r.ID)
	}
	return all
}

// slow is a body that comes in pieces, without a length.
type slow struct {
	io.Reader
	pieces int
}

func (s *slow) Read(p []byte) (int, error) {
	time.Sleep(time.Millisecond)
	return s.Reader.Read(p[:min(len(p), s.pieces)])
}

func TestGoodInput(t *testing.T) {
	s, published := start(t)
	document := openAPIDocument(t)
	h2c := &http.Transport{Protocols: new(http.Protocols)}
	h2c.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(h2c.CloseIdleConnections)
	expecting := &http.Transport{ExpectContinueTimeout: time.Minute}
	t.Cleanup(expecting.CloseIdleConnections)
	key := with(plain, "Idempotency-Key", `"k"`)
	mebibyte := "[" + gt + strings.Repeat(" ", 1<<20-2-len(gt)) + "]"
	var thousand []string
	for i := range 1000 {
		thousand = append(thousand, fmt.Sprintf("%s k/%d", events.DefaultSource, i))
	}
	for _, c := range []struct {
		name, path string
		client     *http.Client
		headers    []string
		body       io.Reader
		want       []string // nil: one new id
	}{
		{name: "a plain report", headers: plain, body: strings.NewReader(gt)},
		{name: "with a key", headers: key, body: strings.NewReader(gt), want: []string{events.DefaultSource + " k"}},
		{name: "an array with a key", headers: key, body: strings.NewReader("[" + gt + "," + gt + "]"), want: thousand[:2]},
		{name: "1000 reports", headers: key, body: strings.NewReader("[" + strings.Repeat(gt+",", 999) + gt + "]"), want: thousand},
		{name: "exactly 1 MiB", headers: key, body: strings.NewReader(mebibyte), want: thousand[:1]},
		{name: "exactly 1 MiB, chunked", headers: key, body: &slow{strings.NewReader(mebibyte), 1 << 16}, want: thousand[:1]},
		{name: "a slow body, chunked", headers: key, body: &slow{strings.NewReader(gt), 10}, want: []string{events.DefaultSource + " k"}},
		{name: "binary", headers: binary, body: strings.NewReader(gt), want: []string{"/app a"}},
		{name: "structured", headers: structured, body: strings.NewReader(envelope), want: []string{"/app a"}},
		{name: "a batch", headers: batch, body: strings.NewReader("[" + envelope + "," + envelope + "]"), want: []string{"/app a", "/app a"}},
		{name: "at the root", path: "/", headers: key, body: strings.NewReader(gt), want: []string{events.DefaultSource + " k"}},
		{name: "with a query", path: "/reports?x=1", headers: key, body: strings.NewReader(gt), want: []string{events.DefaultSource + " k"}},
		{name: "Expect: 100-continue", client: &http.Client{Transport: expecting}, headers: with(key, "Expect", "100-continue"), body: strings.NewReader(gt), want: []string{events.DefaultSource + " k"}},
		{name: "HTTP/2 without TLS", client: &http.Client{Transport: h2c}, headers: key, body: strings.NewReader(gt), want: []string{events.DefaultSource + " k"}},
		{name: "HTTP/2 without TLS and a length", client: &http.Client{Transport: h2c}, headers: key, body: &slow{strings.NewReader(mebibyte), 1 << 16}, want: thousand[:1]},
		{name: "an id with every character", headers: structured, body: strings.NewReader(strings.Replace(envelope, `"a"`, `"\"\u0001é☀️"`, 1)), want: []string{"/app \"\u0001é☀️"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.path == "" {
				c.path = "/reports"
			}
			if c.client == nil {
				c.client = s.Client()
			}
			r := post(t, s.URL+c.path, c.body, c.headers...)
			got := do(t, c.client, r)
			if got.StatusCode != http.StatusAccepted {
				t.Fatalf("%d %s", got.StatusCode, got.body)
			}
			ids, answered := published.take(), identitiesOf(t, got)
			if !slices.Equal(ids, answered) {
				t.Errorf("published %q, answered %q", ids, answered)
			}
			if c.want == nil {
				if len(ids) != 1 || !strings.HasPrefix(ids[0], events.DefaultSource+" 0") {
					t.Errorf("published %q", ids)
				}
			} else if !slices.Equal(ids, c.want) {
				t.Errorf("published %q", ids)
			}
			document.check(t, r, got)
		})
	}
}

func TestOpenAPIIsServed(t *testing.T) {
	s, _ := start(t)
	r := post(t, s.URL+"/openapi.yaml", nil)
	r.Method = http.MethodGet
	got := do(t, s.Client(), r)
	if got.StatusCode != http.StatusOK || !bytes.Equal(got.body, openAPI) {
		t.Errorf("%d %.100s", got.StatusCode, got.body)
	}
	openAPIDocument(t).check(t, r, got)
}

// TestTooLargeIsNotRead: who says that too much comes is told so before it is sent.
func TestTooLargeIsNotRead(t *testing.T) {
	s, _ := start(t)
	conn, err := net.Dial("tcp", s.Listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprintf(conn, "POST /reports HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\nExpect: 100-continue\r\n\r\n", 1<<40)
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusRequestEntityTooLarge || !response.Close {
		t.Errorf("%s, close %v", response.Status, response.Close)
	}
}

// TestTheClientGoesAway: what is not whole is not taken.
func TestTheClientGoesAway(t *testing.T) {
	for name, head := range map[string]string{
		"with a length": fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(gt)+10, gt),
		"in chunks":     fmt.Sprintf("Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n", len(gt), gt),
	} {
		t.Run(name, func(t *testing.T) {
			p, done := new(taken), make(chan struct{})
			handler := Handler(p.publish)
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				defer close(done)
				handler.ServeHTTP(w, r)
			}))
			defer s.Close()
			conn, err := net.Dial("tcp", s.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(conn, "POST /reports HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n%s", head)
			conn.Close()
			<-done
			if ids := p.take(); len(ids) != 0 {
				t.Errorf("published %q", ids)
			}
		})
	}
}

func TestNotPublished(t *testing.T) {
	s, p := start(t)
	document := openAPIDocument(t)
	for _, c := range []struct {
		name   string
		err    error
		status int
		after  string
		says   string
	}{
		{"too much is under way", &NotNow{Busy: true, Detail: "too much", RetryAfter: 1500 * time.Millisecond}, 429, "2", "too much; nothing is promised"},
		{"a broker is away", &NotNow{Detail: "Kafka is away", RetryAfter: time.Second}, 503, "1", "Kafka is away; nothing is promised"},
		{"without a time to wait", &NotNow{Detail: "away"}, 503, "1", "away"},
		{"wrapped", fmt.Errorf("publish: %w", &NotNow{Busy: true, Detail: "too much"}), 429, "1", "too much"},
		{"not in time", context.DeadlineExceeded, 503, "1", "not confirmed in time"},
		{"anything else tells nothing of the inside", errors.New("password=x"), 503, "1", "could not be published"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p.fail = c.err
			r := post(t, s.URL+"/reports", strings.NewReader("["+gt+","+gt+"]"), with(plain, "Idempotency-Key", "k")...)
			got := do(t, s.Client(), r)
			problem := checkProblem(t, got)
			if got.StatusCode != c.status || got.Header.Get("Retry-After") != c.after {
				t.Errorf("%d after %s", got.StatusCode, got.Header.Get("Retry-After"))
			}
			if detail := problem["detail"].(string); !strings.Contains(detail, c.says) || strings.Contains(detail, "password") {
				t.Errorf("the detail is %q", detail)
			}
			if ids := identitiesOf(t, got); !slices.Equal(ids, []string{events.DefaultSource + " k/0", events.DefaultSource + " k/1"}) {
				t.Errorf("the identities are %q", ids)
			}
			document.check(t, r, got)
		})
	}
	t.Run("a rule that only the publisher knows", func(t *testing.T) {
		p.fail = &events.Indexed{Index: 1, Err: &events.Violation{Field: "x", Rule: "must be y"}}
		got := do(t, s.Client(), post(t, s.URL+"/reports", strings.NewReader(gt), plain...))
		if problem := checkProblem(t, got); got.StatusCode != 422 || problem["field"] != "x" || problem["index"] != 1.0 {
			t.Errorf("%d %s", got.StatusCode, got.body)
		}
	})
}

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/IBM/sarama"
	"github.com/cloudevents/sdk-go/binding/format/protobuf/v2/pb"
	"github.com/cloudevents/sdk-go/v2/event"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/timestamppb"

	"isobar.dev/events"
	"isobar.dev/events/api"
	"isobar.dev/internal/kafka"
	"isobar.dev/internal/rabbit"
	publisherv1 "isobar.dev/proto/isobar/publisher/v1"
)

// fake is a Broker that does as it is told, and remembers what was published.
type fake struct {
	answer func(ctx context.Context) error

	mu  sync.Mutex
	ids []string
}

func (f *fake) Publish(ctx context.Context, all []event.Event) error {
	if f.answer != nil {
		if err := f.answer(ctx); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range all {
		f.ids = append(f.ids, all[i].ID())
	}
	return nil
}

func (f *fake) Err() error { return nil }
func (f *fake) Close()     {}

// serveGRPC serves p on a real port.
func serveGRPC(t *testing.T, p *publisher) *grpc.ClientConn {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := newServer(p)
	done := make(chan error)
	go func() { done <- server.Serve(listener) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return dialGRPC(t, listener.Addr().String())
}

func dialGRPC(t *testing.T, addr string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:"+addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// message is a good event in protobuf, changed.
func message(t testing.TB, id string, change func(*pb.CloudEvent)) *pb.CloudEvent {
	t.Helper()
	e := events.New(events.Report{Country: "GT", Weather: "Sunny"}, id, time.Now())
	m, err := events.ToProto(&e)
	if err != nil {
		t.Fatal(err)
	}
	m = proto.CloneOf(m) // what it shares with others must stay as it is
	if change != nil {
		change(m)
	}
	return m
}

func text(s string) *pb.CloudEventAttributeValue {
	return &pb.CloudEventAttributeValue{Attr: &pb.CloudEventAttributeValue_CeString{CeString: s}}
}

// number makes the event one that is not in the form in which the ingress writes.
func number(m *pb.CloudEvent) {
	m.Attributes["n"] = &pb.CloudEventAttributeValue{Attr: &pb.CloudEventAttributeValue_CeInteger{CeInteger: 7}}
}

// requestCases are single events; field is what a refused one is refused for, "-" where it is taken.
var requestCases = []struct {
	name   string
	change func(*pb.CloudEvent)
	field  string
}{
	{"as the ingress sends it", func(*pb.CloudEvent) {}, "-"},
	{"with a trace context", func(m *pb.CloudEvent) { m.Attributes["traceparent"] = text("00-1") }, "-"},
	{"the data as text", func(m *pb.CloudEvent) {
		m.Data = &pb.CloudEvent_TextData{TextData: `{"country":"GT","weather":"Sunny"}`}
	}, "-"},
	{"the data as text, without a content type", func(m *pb.CloudEvent) {
		m.Data = &pb.CloudEvent_TextData{TextData: `{"country":"GT","weather":"Sunny"}`}
		delete(m.Attributes, "datacontenttype")
	}, "-"},
	{"only what must be", func(m *pb.CloudEvent) { m.Attributes = nil }, "-"},
	{"extensions of other types", number, "-"},
	{"a country in lower case", func(m *pb.CloudEvent) {
		m.Data = &pb.CloudEvent_BinaryData{BinaryData: []byte(`{"country":"gt","weather":"x"}`)}
	}, "-"},

	{"empty", func(m *pb.CloudEvent) { proto.Reset(m) }, "events[1]"},
	{"no id", func(m *pb.CloudEvent) { m.Id = "" }, "events[1]"},
	{"an id of spaces", func(m *pb.CloudEvent) { m.Id = "  " }, "events[1].id"},
	{"an id with a space at its end", func(m *pb.CloudEvent) { m.Id += " " }, "events[1].id"},
	{"an id with a space at its end, which the SDK drops", func(m *pb.CloudEvent) { m.Id += " "; number(m) }, "events[1].id"},
	{"an id of 257 bytes", func(m *pb.CloudEvent) { m.Id = strings.Repeat("i", 257) }, "events[1].id"},
	{"no source", func(m *pb.CloudEvent) { m.Source = "" }, "events[1]"},
	{"a source that is no URI", func(m *pb.CloudEvent) { m.Source = "http://[::1" }, "events[1]"},
	{"a source of 513 bytes", func(m *pb.CloudEvent) { m.Source = strings.Repeat("s", 513) }, "events[1].source"},
	{"no version", func(m *pb.CloudEvent) { m.SpecVersion = "" }, "events[1]"},
	{"an older version", func(m *pb.CloudEvent) { m.SpecVersion = "0.3" }, "events[1].specversion"},
	{"a version nobody knows", func(m *pb.CloudEvent) { m.SpecVersion = "7" }, "events[1]"},
	{"no type", func(m *pb.CloudEvent) { m.Type = "" }, "events[1]"},
	{"another type", func(m *pb.CloudEvent) { m.Type = "com.example" }, "events[1].type"},
	{"no data", func(m *pb.CloudEvent) { m.Data = nil }, "events[1].data"},
	{"data that is a message", func(m *pb.CloudEvent) {
		m.Data = &pb.CloudEvent_ProtoData{ProtoData: &anypb.Any{Value: []byte("x")}}
		delete(m.Attributes, "datacontenttype")
	}, "events[1].datacontenttype"},
	{"data that is no JSON", func(m *pb.CloudEvent) { m.Data = &pb.CloudEvent_BinaryData{BinaryData: []byte("{")} }, "events[1]"},
	{"data that is a list", func(m *pb.CloudEvent) { m.Data = &pb.CloudEvent_BinaryData{BinaryData: []byte("[]")} }, "events[1]"},
	{"data in XML", func(m *pb.CloudEvent) { m.Attributes["datacontenttype"] = text("text/xml") }, "events[1].datacontenttype"},
	{"a country that is none", func(m *pb.CloudEvent) {
		m.Data = &pb.CloudEvent_BinaryData{BinaryData: []byte(`{"country":"XX","weather":"x"}`)}
	}, "events[1].country"},
	{"no weather", func(m *pb.CloudEvent) {
		m.Data = &pb.CloudEvent_BinaryData{BinaryData: []byte(`{"country":"GT"}`)}
	}, "events[1].weather"},
	{"a subject that is another country", func(m *pb.CloudEvent) { m.Attributes["subject"] = text("ES") }, "events[1].subject"},
	{"a time in the year 10000", func(m *pb.CloudEvent) {
		m.Attributes["time"] = &pb.CloudEventAttributeValue{Attr: &pb.CloudEventAttributeValue_CeTimestamp{CeTimestamp: timestamppb.New(time.Date(10000, 1, 1, 0, 0, 0, 0, time.UTC))}}
	}, "events[1].time"},
	{"a time that is text", func(m *pb.CloudEvent) { m.Attributes["time"] = text("yesterday") }, "events[1]"},
	{"an extension called data", func(m *pb.CloudEvent) { m.Attributes["data"] = text("x") }, "events[1].data"},
	{"an extension with a bad name", func(m *pb.CloudEvent) { m.Attributes["a-b"] = text("x") }, "events[1]"},
	{"an attribute twice", func(m *pb.CloudEvent) { m.Attributes["id"] = text("x") }, "events[1]"},
	{"an attribute without a value", func(m *pb.CloudEvent) { m.Attributes["x"] = &pb.CloudEventAttributeValue{} }, "events[1]"},
	{"an extension of 64 KiB", func(m *pb.CloudEvent) { m.Attributes["x"] = text(strings.Repeat("x", 64<<10)) }, "events[1]"},
}

func details[T any](s *status.Status) (found T) {
	for _, d := range s.Details() {
		if d, ok := d.(T); ok {
			return d
		}
	}
	return found
}

func TestGRPCRequests(t *testing.T) {
	for _, c := range requestCases {
		t.Run(c.name, func(t *testing.T) {
			b := new(fake)
			client := publisherv1.NewPublisherServiceClient(serveGRPC(t, &publisher{brokers: b}))
			_, err := client.Publish(t.Context(), &publisherv1.PublishRequest{Events: []*pb.CloudEvent{
				message(t, "before", nil), message(t, "it", c.change), message(t, "after", nil),
			}})
			if c.field == "-" {
				if err != nil || !slices.Equal(b.ids, []string{"before", "it", "after"}) {
					t.Errorf("published %q: %v", b.ids, err)
				}
				return
			}
			s := status.Convert(err)
			violations := details[*errdetails.BadRequest](s).GetFieldViolations()
			if s.Code() != codes.InvalidArgument || len(violations) != 1 || violations[0].Description == "" {
				t.Fatalf("the status is %v with %v", s, s.Details())
			}
			if field := violations[0].Field; field != c.field || !strings.Contains(s.Message(), field) {
				t.Errorf("the field is %q in %q, want %q", field, s.Message(), c.field)
			}
			if len(b.ids) != 0 {
				t.Errorf("published %q all the same", b.ids)
			}
		})
	}
	for name, n := range map[string]int{"no event": 0, "5001 events": 5001} {
		t.Run(name, func(t *testing.T) {
			_, err := (&publisher{brokers: new(fake)}).Publish(t.Context(), &publisherv1.PublishRequest{
				Events: slices.Repeat([]*pb.CloudEvent{message(t, "x", nil)}, n),
			})
			s := status.Convert(err)
			if v := details[*errdetails.BadRequest](s).GetFieldViolations(); s.Code() != codes.InvalidArgument || len(v) != 1 || v[0].Field != "events" {
				t.Errorf("the status is %v", s)
			}
		})
	}
	t.Run("5000 events", func(t *testing.T) {
		if _, err := (&publisher{brokers: new(fake)}).Publish(t.Context(), &publisherv1.PublishRequest{
			Events: slices.Repeat([]*pb.CloudEvent{message(t, "x", nil)}, 5000),
		}); err != nil {
			t.Error(err)
		}
	})
}

// answerCases are what brokers answer, and what becomes of it at both interfaces.
var answerCases = []struct {
	name     string
	answer   func(context.Context) error
	underWay int64
	within   time.Duration // the caller's deadline
	code     codes.Code
	broker   string
	rest     int
	says     string
}{
	{name: "confirmed", code: codes.OK, rest: 202},
	{name: "as much under way as may be", underWay: maxUnderWay - 1, code: codes.OK, rest: 202},
	{name: "more under way than may be", underWay: maxUnderWay, code: codes.ResourceExhausted, rest: 429, says: "too many"},
	{name: "a broker is away", answer: func(context.Context) error {
		return errors.Join(&brokerError{"kafka", fmt.Errorf("%w: connection refused", kafka.ErrAway)})
	}, code: codes.Unavailable, broker: "kafka", rest: 503, says: "kafka: no connection to Kafka"},
	{name: "a broker is away because its connection timed out", answer: func(context.Context) error {
		_, timedOut := net.DialTimeout("tcp", "127.0.0.1:1", 1)
		return &brokerError{"rabbitmq", fmt.Errorf("%w: %w", rabbit.ErrAway, timedOut)}
	}, code: codes.Unavailable, broker: "rabbitmq", rest: 503, says: "rabbitmq: RabbitMQ is away"},
	{name: "a broker is away because it was closed", answer: func(context.Context) error {
		return &brokerError{"rabbitmq", fmt.Errorf("%w: %w", rabbit.ErrAway, context.Canceled)}
	}, code: codes.Unavailable, broker: "rabbitmq", rest: 503, says: "rabbitmq: RabbitMQ is away"},
	{name: "a broker has refused", answer: func(context.Context) error {
		return errors.Join(&brokerError{"rabbitmq", rabbit.ErrNotStored})
	}, code: codes.Unavailable, broker: "rabbitmq", rest: 503, says: "has not stored"},
	{name: "no word until the deadline", answer: func(ctx context.Context) error {
		<-ctx.Done()
		return &brokerError{"kafka", fmt.Errorf("publish: %w", ctx.Err())}
	}, within: 20 * time.Millisecond, code: codes.DeadlineExceeded, rest: 503, says: "not confirmed in time"},
}

func TestAnswers(t *testing.T) {
	for _, c := range answerCases {
		t.Run("gRPC: "+c.name, func(t *testing.T) {
			p := &publisher{brokers: &fake{answer: c.answer}}
			p.underWay.Store(c.underWay)
			ctx, cancel := t.Context(), context.CancelFunc(func() {})
			if c.within > 0 {
				ctx, cancel = context.WithTimeout(ctx, c.within)
			}
			defer cancel()
			// Without a network: a client makes its own status of a deadline.
			_, err := p.Publish(ctx, &publisherv1.PublishRequest{Events: []*pb.CloudEvent{message(t, "a", nil)}})
			s := status.Convert(err)
			if s.Code() != c.code || details[*errdetails.ErrorInfo](s).GetMetadata()["broker"] != c.broker {
				t.Errorf("the status is %v, of the broker %q", s, details[*errdetails.ErrorInfo](s).GetMetadata()["broker"])
			}
			if wait := details[*errdetails.RetryInfo](s).GetRetryDelay().AsDuration(); c.code != codes.OK && wait != retryAfter {
				t.Errorf("to be tried again after %v", wait)
			}
			if p.underWay.Load() != c.underWay {
				t.Errorf("%d are under way afterwards", p.underWay.Load())
			}
		})
		t.Run("REST: "+c.name, func(t *testing.T) {
			p := &publisher{brokers: &fake{answer: c.answer}}
			p.underWay.Store(c.underWay)
			ctx, cancel := t.Context(), context.CancelFunc(func() {})
			if c.within > 0 {
				ctx, cancel = context.WithTimeout(ctx, c.within)
			}
			defer cancel()
			w := respond(ctx, api.Handler(p.rest))
			if w.status != c.rest || !strings.Contains(w.body.String(), c.says) {
				t.Errorf("%d %s", w.status, &w.body)
			}
		})
	}
	t.Run("a caller that gave up", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		p := &publisher{brokers: &fake{answer: func(ctx context.Context) error { cancel(); <-ctx.Done(); return ctx.Err() }}}
		_, err := p.Publish(ctx, &publisherv1.PublishRequest{Events: []*pb.CloudEvent{message(t, "a", nil)}})
		if status.Code(err) != codes.Canceled {
			t.Errorf("the status is %v", err)
		}
	})
}

type response struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (r *response) Header() http.Header         { return r.header }
func (r *response) WriteHeader(status int)      { r.status = status }
func (r *response) Write(b []byte) (int, error) { return r.body.Write(b) }

func respond(ctx context.Context, h http.Handler) *response {
	const body = `{"country":"GT","weather":"Sunny"}`
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, "/reports", strings.NewReader(body))
	if err != nil {
		panic(err)
	}
	r.Header.Set("Content-Type", "application/json")
	w := &response{header: http.Header{}}
	h.ServeHTTP(w, r)
	return w
}

func TestDeadlines(t *testing.T) {
	for name, c := range map[string]struct{ callers, want time.Duration }{
		"the caller's is kept":       {2 * time.Second, 2 * time.Second},
		"a longer one is cut":        {time.Hour, timeout},
		"without one there is still": {0, timeout},
	} {
		t.Run(name, func(t *testing.T) {
			var left time.Duration
			b := &fake{answer: func(ctx context.Context) error {
				deadline, ok := ctx.Deadline()
				if !ok {
					return errors.New("no deadline")
				}
				left = time.Until(deadline)
				return nil
			}}
			client := publisherv1.NewPublisherServiceClient(serveGRPC(t, &publisher{brokers: b}))
			ctx, cancel := t.Context(), context.CancelFunc(func() {})
			if c.callers > 0 {
				ctx, cancel = context.WithTimeout(ctx, c.callers)
			}
			defer cancel()
			if _, err := client.Publish(ctx, &publisherv1.PublishRequest{Events: []*pb.CloudEvent{message(t, "a", nil)}}); err != nil {
				t.Fatal(err)
			}
			if left > c.want || left < c.want-time.Second {
				t.Errorf("%v are left, want %v", left, c.want)
			}
		})
	}
}

// TestOnePort runs the whole program on one port, as Knative has it, and on two, its brokers away.
func TestOnePort(t *testing.T) {
	nobody := fmt.Sprintf("127.0.0.1:%d", freePort(t))
	for name, s := range map[string]settings{
		"one":   {Port: fmt.Sprint(freePort(t))},
		"two":   {GRPCPort: fmt.Sprint(freePort(t)), RESTPort: fmt.Sprint(freePort(t))},
		"three": {Port: fmt.Sprint(freePort(t)), GRPCPort: "50051", RESTPort: "8081"}, // with PORT the others are not used
	} {
		t.Run(name, func(t *testing.T) {
			s.Host, s.Topic, s.Queue = "127.0.0.1", "message", "message"
			s.Kafka, s.RabbitMQ = kafka.Settings{Brokers: []string{nobody}}, rabbit.Settings{Addr: nobody}
			p, err := build(t.Context(), s)
			if err != nil {
				t.Fatal(err)
			}
			ctx, stop := context.WithCancel(t.Context())
			done := make(chan error)
			go func() { done <- p.Run(ctx) }()
			defer func() {
				stop()
				if err := <-done; err != nil {
					t.Error(err)
				}
			}()
			ports := []string{s.Port, s.Port}
			if s.Port == "" {
				ports = []string{s.GRPCPort, s.RESTPort}
			}
			conn := dialGRPC(t, "127.0.0.1:"+ports[0])
			_, err = publisherv1.NewPublisherServiceClient(conn).Publish(t.Context(),
				&publisherv1.PublishRequest{Events: []*pb.CloudEvent{message(t, "a", nil)}}, grpc.WaitForReady(true))
			if s := status.Convert(err); s.Code() != codes.Unavailable || details[*errdetails.ErrorInfo](s) == nil {
				t.Errorf("Publish without brokers: %v", err)
			}
			for _, service := range []string{"", "isobar.publisher.v1.PublisherService"} {
				state, err := healthv1.NewHealthClient(conn).Check(t.Context(), &healthv1.HealthCheckRequest{Service: service})
				if err != nil || state.Status != healthv1.HealthCheckResponse_SERVING {
					t.Errorf("health of %q: %v, %v", service, state, err)
				}
			}
			if names := reflected(t, conn); !slices.Contains(names, "isobar.publisher.v1.PublisherService") {
				t.Errorf("reflection lists %q", names)
			}

			rest := "http://127.0.0.1:" + ports[1]
			r, err := http.Post(rest+"/reports", "application/json", strings.NewReader(`{"country":"GT","weather":"Sunny"}`))
			if err != nil {
				t.Fatal(err)
			}
			r.Body.Close()
			if r.StatusCode != 503 || r.Header.Get("Retry-After") == "" {
				t.Errorf("POST without brokers: %s", r.Status)
			}
			if r, err = http.Get(rest + "/readyz"); err != nil {
				t.Fatal(err)
			}
			defer r.Body.Close()
			if body, _ := io.ReadAll(r.Body); r.StatusCode != 200 || !strings.Contains(string(body), `"kafka":"away`) || !strings.Contains(string(body), `"rabbitmq":"away`) {
				t.Errorf("/readyz: %s %s", r.Status, body)
			}
			http.DefaultClient.CloseIdleConnections()
		})
	}
}

func reflected(t *testing.T, conn *grpc.ClientConn) (names []string) {
	t.Helper()
	stream, err := reflectionv1.NewServerReflectionClient(conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	answer, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range answer.GetListServicesResponse().GetService() {
		names = append(names, s.Name)
	}
	if err := stream.CloseSend(); err != nil {
		t.Error(err)
	}
	return names
}

func TestEvery(t *testing.T) {
	errAway := errors.New("away")
	good, bad := new(fake), &fake{answer: func(context.Context) error { return errAway }}
	var of *brokerError
	if err := (every{"kafka": good, "rabbitmq": bad}).Publish(t.Context(), reports("x", 1)); !errors.Is(err, errAway) || !errors.As(err, &of) || of.broker != "rabbitmq" {
		t.Errorf("one of two: %v", err)
	}
	if err := (every{"kafka": good, "rabbitmq": new(fake)}).Publish(t.Context(), reports("x", 1)); err != nil {
		t.Errorf("both: %v", err)
	}
}

// FuzzRead: no bytes make it panic; what is refused is refused with its field, and what is taken reads on both brokers
// as it is.
func FuzzRead(f *testing.F) {
	for _, c := range requestCases {
		wire, err := proto.Marshal(&publisherv1.PublishRequest{Events: []*pb.CloudEvent{message(f, "a", c.change)}})
		if err != nil {
			f.Fatal(err)
		}
		f.Add(wire)
	}
	f.Fuzz(func(t *testing.T, wire []byte) {
		request := new(publisherv1.PublishRequest)
		if proto.Unmarshal(wire, request) != nil {
			return // gRPC answers
		}
		all, err := read(request)
		if err != nil {
			s := status.Convert(err)
			if s.Code() != codes.InvalidArgument || len(details[*errdetails.BadRequest](s).GetFieldViolations()) != 1 {
				t.Errorf("the status is %v", s)
			}
			return
		}
		for i, e := range all {
			if e.ID() != request.Events[i].Id {
				t.Errorf("id %q has become %q", request.Events[i].Id, e.ID())
			}
			if err := e.Validate(); err != nil {
				t.Fatal(err)
			}
			record, err := events.WriteRecord(&e, "message")
			if err != nil {
				t.Fatal(err)
			}
			value, err := record.Value.Encode()
			if err != nil {
				t.Fatal(err)
			}
			consumed := &sarama.ConsumerMessage{Value: value}
			for _, h := range record.Headers {
				consumed.Headers = append(consumed.Headers, &h)
			}
			for broker, got := range map[string]event.Event{
				"Kafka": events.ReadRecord(consumed, "/k"), "RabbitMQ": events.ReadMessage(events.WriteMessage(&e), "/r"),
			} {
				if got.ID() != e.ID() || got.Source() != e.Source() || got.Type() != e.Type() || string(got.Data()) != string(e.Data()) || !got.Time().Equal(e.Time()) {
					t.Errorf("on %s it is\n%s\nnot\n%s", broker, got, e)
				}
			}
		}
	})
}

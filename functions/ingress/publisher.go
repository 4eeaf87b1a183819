package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"github.com/cloudevents/sdk-go/binding/format/protobuf/v2/pb"
	"github.com/cloudevents/sdk-go/v2/event"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"isobar.dev/events"
	"isobar.dev/events/api"
	"isobar.dev/internal/group"
	"isobar.dev/internal/peer"
	publisherv1 "isobar.dev/proto/isobar/publisher/v1"
)

const (
	// inFlight is how many calls are under way at once: while the brokers sync one batch to disk, the next is read.
	inFlight = 4
	// linger bounds what a call waits for the clients that have just been answered.
	linger = 2 * time.Millisecond
	// maxGroup is the most reports that the publisher takes in one call.
	maxGroup = 5000
	// waiting is the most reports that wait for a call; what comes beyond is told 429.
	waiting = 5000
	// callBytes keeps a call well below gRPC's limit of 4 MiB a message.
	callBytes = 2 << 20
	// timeout bounds a call. A publisher that must start first fits into it.
	timeout = 12 * time.Second
)

// publisher is the ingress's side of the gRPC contract.
type publisher struct {
	conn   *grpc.ClientConn
	client publisherv1.PublisherServiceClient
	group  *group.Committer[*pb.CloudEvent]
	secure peer.TLS
	log    peer.Log
}

func newPublisher(addr string, secure peer.TLS, groupSize int) (*publisher, error) {
	if groupSize < 1 || groupSize > maxGroup {
		return nil, fmt.Errorf("GROUP_SIZE must be 1 to %d, not %d", maxGroup, groupSize)
	}
	transport, err := newTransport(secure)
	if err != nil {
		return nil, err
	}
	conn, err := grpc.NewClient(addr,
		grpc.WithTransportCredentials(transport),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
	)
	if err != nil {
		return nil, fmt.Errorf("PUBLISHER_ADDR %q: %w", addr, err)
	}
	p := &publisher{conn: conn, client: publisherv1.NewPublisherServiceClient(conn), secure: secure, log: peer.Log{Peer: "publisher"}}
	calls := inFlight
	if groupSize == 1 {
		calls = waiting // then nothing is grouped, and nothing waits for anything else
	}
	p.group = group.New(group.Options[*pb.CloudEvent]{
		Commit:   p.call,
		Batch:    groupSize,
		Bytes:    callBytes,
		Size:     size,
		InFlight: calls,
		Linger:   linger,
		Waiting:  waiting,
		Timeout:  timeout,
		Alone:    func(err error) bool { return status.Code(err) == codes.InvalidArgument },
	})
	return p, nil
}

// publish is api.Publish.
func (p *publisher) publish(ctx context.Context, reports []event.Event) error {
	messages := make([]*pb.CloudEvent, len(reports))
	for i := range reports {
		message, err := events.ToProto(&reports[i])
		if err != nil {
			return fmt.Errorf("write event %q as protobuf: %w", reports[i].ID(), err)
		}
		messages[i] = message
	}
	err := p.group.Commit(ctx, messages...)
	switch {
	case err == nil, ctx.Err() != nil:
		return err
	case errors.Is(err, group.ErrFull):
		return &api.NotNow{Busy: true, Detail: "too many reports wait for the publisher", RetryAfter: time.Second}
	case errors.Is(err, group.ErrClosed):
		return &api.NotNow{Detail: "this process is stopping", RetryAfter: time.Second}
	}
	return notNow(err)
}

// size is about what a message takes; counting it exactly would cost as much as writing it.
func size(m *pb.CloudEvent) int {
	const fields = 64
	n := fields + len(m.Id) + len(m.Source) + len(m.Type) + len(m.GetBinaryData())
	for name, value := range m.Attributes {
		n += fields + len(name) + len(value.GetCeString())
	}
	return n
}

func (p *publisher) call(ctx context.Context, batch []*pb.CloudEvent) error {
	_, err := p.client.Publish(ctx, &publisherv1.PublishRequest{Events: batch})
	switch s := status.Convert(err); {
	case err == nil, len(s.Details()) > 0: // these are the publisher's
		p.log.Back()
	case s.Code() == codes.Unavailable:
		p.log.Away(p.why(s.Message()))
	}
	return err
}

// why is the error of a connection that is not there.
func (p *publisher) why(says string) error {
	if strings.Contains(says, "error reading server preface") {
		advice, _ := p.secure.Advice(io.EOF)
		says += ": " + advice
	}
	return errors.New(says)
}

// notNow makes of a call's status what a client is told.
func notNow(err error) error {
	s := status.Convert(err)
	e := &api.NotNow{
		Busy:       s.Code() == codes.ResourceExhausted,
		Detail:     "the publisher is away",
		RetryAfter: time.Second,
	}
	for _, detail := range s.Details() {
		switch detail := detail.(type) {
		case *errdetails.RetryInfo:
			e.RetryAfter = detail.GetRetryDelay().AsDuration()
		case *errdetails.ErrorInfo:
			e.Detail = "a broker has not taken the reports: " + detail.GetMetadata()["broker"]
		}
	}
	switch s.Code() {
	case codes.ResourceExhausted:
		e.Detail = "too many reports are under way"
	case codes.DeadlineExceeded:
		e.Detail = "the brokers have not confirmed in time"
	case codes.InvalidArgument:
		e.Detail = "the publisher refuses what the ingress takes, they are of different versions: " + s.Message()
	}
	return e
}

func (p *publisher) close() {
	p.group.Close()
	p.conn.Close()
}

// peers is what /readyz says of the publisher: the state of the connection, without making one, and why it was away at the
// last call.
func (p *publisher) peers() map[string]string {
	state := p.conn.GetState().String()
	if err := p.log.Err(); err != nil {
		state += ": " + err.Error()
	}
	return map[string]string{"publisher": state}
}

// transport is the credentials of the connections to the publisher, made anew for each. gRPC passes on no error but as
// text, so that what to do about one is said here.
type transport struct {
	credentials.TransportCredentials
	secure peer.TLS
}

func newTransport(secure peer.TLS) (*transport, error) {
	config, err := secure.Config()
	if err != nil {
		return nil, err
	}
	t := &transport{insecure.NewCredentials(), secure}
	if config != nil {
		t.TransportCredentials = credentials.NewTLS(config)
	}
	return t, nil
}

func (t *transport) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	t, err := newTransport(t.secure)
	if err != nil {
		return nil, nil, err
	}
	conn, info, err := t.TransportCredentials.ClientHandshake(ctx, authority, conn)
	return conn, info, t.secure.Explain(err)
}

func (t *transport) Clone() credentials.TransportCredentials {
	return &transport{t.TransportCredentials.Clone(), t.secure}
}

package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cloudevents/sdk-go/binding/format/protobuf/v2/pb"
	"github.com/cloudevents/sdk-go/v2/event"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	"isobar.dev/events"
	"isobar.dev/events/api"
	"isobar.dev/internal/group"
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
}

func newPublisher(addr string, groupSize int) (*publisher, error) {
	if groupSize < 1 || groupSize > maxGroup {
		return nil, fmt.Errorf("GROUP_SIZE must be 1 to %d, not %d", maxGroup, groupSize)
	}
	conn, err := grpc.NewClient(addr,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}),
	)
	if err != nil {
		return nil, fmt.Errorf("PUBLISHER_ADDR %q: %w", addr, err)
	}
	p := &publisher{conn: conn, client: publisherv1.NewPublisherServiceClient(conn)}
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
	return err
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

// peers is what /readyz says of the publisher: the state of the connection, without making one.
func (p *publisher) peers() map[string]string {
	return map[string]string{"publisher": p.conn.GetState().String()}
}

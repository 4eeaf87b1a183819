package main

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/cloudevents/sdk-go/v2/event"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"isobar.dev/events"
	"isobar.dev/events/api"
	publisherv1 "isobar.dev/proto/isobar/publisher/v1"
)

const (
	// maxEvents is the most events of one call.
	maxEvents = 5000
	// maxUnderWay is the most events that wait for the brokers' word at once, over all calls; it bounds the memory.
	maxUnderWay = 10_000
	// timeout bounds a call that brings no deadline of its own, or a longer one.
	timeout = 10 * time.Second
	// retryAfter is what a caller is told to wait.
	retryAfter = time.Second
)

// errBusy is the error for more than maxUnderWay.
var errBusy = errors.New("too many reports are under way")

// publisher puts reports on the brokers; it is the gRPC service.
type publisher struct {
	publisherv1.UnimplementedPublisherServiceServer
	brokers  Broker
	underWay atomic.Int64
}

// publish is what gRPC and REST have in common.
func (p *publisher) publish(ctx context.Context, reports []event.Event) error {
	n := int64(len(reports))
	defer p.underWay.Add(-n)
	if p.underWay.Add(n) > maxUnderWay {
		return errBusy
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err := p.brokers.Publish(ctx, reports)
	if err != nil && ctx.Err() != nil {
		return &overdue{ctx.Err(), err}
	}
	return err
}

// overdue is the error of a call whose context has ended. That a broker's error says so is not enough: it may be away
// because its connection has timed out.
type overdue struct{ why, err error }

func (e *overdue) Error() string { return e.err.Error() }

// Publish implements the gRPC contract.
func (p *publisher) Publish(ctx context.Context, request *publisherv1.PublishRequest) (*publisherv1.PublishResponse, error) {
	reports, err := read(request)
	if err != nil {
		return nil, err
	}
	if err := p.publish(ctx, reports); err != nil {
		return nil, grpcError(err)
	}
	return &publisherv1.PublishResponse{}, nil
}

// read checks the events of a call as the HTTP interface does.
func read(request *publisherv1.PublishRequest) ([]event.Event, error) {
	if n := len(request.GetEvents()); n == 0 || n > maxEvents {
		return nil, invalid("events", fmt.Sprintf("must be 1 to %d events, not %d", maxEvents, n))
	}
	reports := make([]event.Event, len(request.Events))
	now := time.Now()
	for i, message := range request.Events {
		e, err := events.FromProto(message)
		if err == nil {
			err = events.Normalize(&e, now)
		}
		if err != nil {
			field := fmt.Sprintf("events[%d]", i)
			if broken, ok := errors.AsType[*events.Violation](err); ok && broken.Field != "" {
				field += "." + broken.Field
			}
			return nil, invalid(field, err.Error())
		}
		reports[i] = e
	}
	return reports, nil
}

func invalid(field, description string) error {
	return withDetails(codes.InvalidArgument, field+": "+description, &errdetails.BadRequest{
		FieldViolations: []*errdetails.BadRequest_FieldViolation{{Field: field, Description: description}},
	})
}

// grpcError gives an error of publish its status.
func grpcError(err error) error {
	retry := &errdetails.RetryInfo{RetryDelay: durationpb.New(retryAfter)}
	late, ended := errors.AsType[*overdue](err)
	switch {
	case errors.Is(err, errBusy):
		return withDetails(codes.ResourceExhausted, err.Error(), retry)
	case ended && errors.Is(late.why, context.DeadlineExceeded):
		return withDetails(codes.DeadlineExceeded, err.Error(), retry)
	case ended:
		return status.FromContextError(late.why).Err()
	}
	info := &errdetails.ErrorInfo{Reason: "BROKER_UNAVAILABLE", Domain: "isobar.dev"}
	if of, ok := errors.AsType[*brokerError](err); ok {
		info.Metadata = map[string]string{"broker": of.broker}
	}
	return withDetails(codes.Unavailable, err.Error(), info, retry)
}

func withDetails(code codes.Code, message string, details ...protoadapt.MessageV1) error {
	plain := status.New(code, message)
	detailed, err := plain.WithDetails(details...)
	if err != nil {
		return plain.Err()
	}
	return detailed.Err()
}

// rest is publish for the HTTP interface.
func (p *publisher) rest(ctx context.Context, reports []event.Event) error {
	err := p.publish(ctx, reports)
	if late, ended := errors.AsType[*overdue](err); ended {
		return late.why
	}
	switch {
	case err == nil:
		return nil
	case errors.Is(err, errBusy):
		return &api.NotNow{Busy: true, Detail: err.Error(), RetryAfter: retryAfter}
	}
	return &api.NotNow{Detail: err.Error(), RetryAfter: retryAfter}
}

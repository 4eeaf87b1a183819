// Kafkasource posts the records of a topic as Knative's KafkaSource does, for a cluster where that is not installed: one
// event per POST in CloudEvents binary mode, one at a time for each partition, with the extensions knativekafkapartition
// and knativekafkaoffset; what is no CloudEvent is wrapped as dev.knative.kafka.event. It tries again on 429, 5xx and no
// answer; what the sink refuses, or has not taken after RETRY times, goes to DEAD_LETTER_SINK. It commits every 5 s, so that
// all of the last seconds comes again when it is killed.
package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/IBM/sarama"
)

const (
	retries = 20
	backoff = 100 * time.Millisecond
	longest = 2 * time.Second
)

func main() {
	if err := run(); err != nil {
		log.Fatal(err)
	}
}

func run() error {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	config := sarama.NewConfig()
	config.Version = sarama.V3_0_0_0
	config.Consumer.Offsets.Initial = sarama.OffsetOldest
	config.Consumer.Offsets.AutoCommit.Interval = 5 * time.Second
	config.Consumer.Group.Session.Timeout = 6 * time.Second
	config.Consumer.Group.Heartbeat.Interval = 2 * time.Second
	group, err := sarama.NewConsumerGroup(strings.Split(os.Getenv("KAFKA_BOOTSTRAP_SERVERS"), ","), os.Getenv("KAFKA_GROUP_ID"), config)
	if err != nil {
		return err
	}
	topic := os.Getenv("KAFKA_TOPIC")
	source := sender{
		sink: os.Getenv("K_SINK"), deadLetterSink: os.Getenv("DEAD_LETTER_SINK"),
		name: fmt.Sprintf("/apis/v1/namespaces/%s/kafkasources/%s#%s", os.Getenv("NAMESPACE"), os.Getenv("NAME"), topic),
	}
	for ctx.Err() == nil {
		if err := group.Consume(ctx, []string{topic}, &source); err != nil {
			log.Print(err)
			time.Sleep(time.Second)
		}
	}
	return group.Close()
}

type sender struct{ sink, deadLetterSink, name string }

func (s *sender) Setup(sarama.ConsumerGroupSession) error   { return nil }
func (s *sender) Cleanup(sarama.ConsumerGroupSession) error { return nil }

func (s *sender) ConsumeClaim(session sarama.ConsumerGroupSession, claim sarama.ConsumerGroupClaim) error {
	for record := range claim.Messages() {
		if !s.deliver(session.Context(), record) {
			return nil
		}
		session.MarkMessage(record, "")
	}
	return nil
}

// deliver reports whether the record is done with.
func (s *sender) deliver(ctx context.Context, record *sarama.ConsumerMessage) bool {
	header := s.header(record)
	status, said, err := post(ctx, s.sink, header, record.Value, retries)
	if err == nil && status < 300 {
		return true
	}
	if ctx.Err() != nil {
		return false
	}
	header.Set("ce-knativeerrordest", s.sink)
	header.Set("ce-knativeerrorcode", strconv.Itoa(status))
	header.Set("ce-knativeerrordata", base64.StdEncoding.EncodeToString(said))
	status, said, err = post(ctx, s.deadLetterSink, header, record.Value, retries)
	if ctx.Err() == nil && (err != nil || status >= 300) {
		log.Printf("partition %d, offset %d is lost: %d %s %v", record.Partition, record.Offset, status, said, err)
	}
	return ctx.Err() == nil
}

// header is that of CloudEvents' binary mode.
func (s *sender) header(record *sarama.ConsumerMessage) http.Header {
	h := http.Header{"Prefer": {"reply"}}
	event := false
	for _, field := range record.Headers {
		name := strings.ToLower(string(field.Key))
		switch {
		case strings.HasPrefix(name, "ce_"):
			h.Set("ce-"+name[3:], string(field.Value))
			event = event || name == "ce_specversion"
		case name == "content-type":
			h.Set("Content-Type", string(field.Value))
		}
	}
	if !event {
		h = http.Header{"Prefer": {"reply"}}
		h.Set("ce-specversion", "1.0")
		h.Set("ce-type", "dev.knative.kafka.event")
		h.Set("ce-source", s.name)
		h.Set("ce-id", fmt.Sprintf("partition:%d/offset:%d", record.Partition, record.Offset))
		h.Set("ce-subject", fmt.Sprintf("partition:%d#%d", record.Partition, record.Offset))
		h.Set("ce-time", record.Timestamp.UTC().Format(time.RFC3339Nano))
	}
	h.Set("ce-knativekafkapartition", strconv.Itoa(int(record.Partition)))
	h.Set("ce-knativekafkaoffset", strconv.FormatInt(record.Offset, 10))
	return h
}

// post posts until there is an answer that is not to be tried again.
func post(ctx context.Context, url string, header http.Header, body []byte, times int) (status int, said []byte, err error) {
	for pause := backoff; ; pause = min(2*pause, longest) {
		status, said, err = once(ctx, url, header, body)
		again := err != nil || status == http.StatusTooManyRequests || status == http.StatusRequestTimeout ||
			status == http.StatusConflict || status == http.StatusNotFound || status >= 500
		if !again || times == 0 {
			return status, said, err
		}
		times--
		select {
		case <-ctx.Done():
			return status, said, errors.Join(err, ctx.Err())
		case <-time.After(pause):
		}
	}
}

func once(ctx context.Context, url string, header http.Header, body []byte) (int, []byte, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	r.Header = header.Clone()
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		return 0, nil, err
	}
	defer answer.Body.Close()
	said, err := io.ReadAll(io.LimitReader(answer.Body, 1024))
	return answer.StatusCode, said, err
}

package peer

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"time"
)

// TLS says how the connections to a peer are secured.
type TLS struct {
	Peer   string // as advice calls it: "Kafka", "the store"
	Prefix string // of the variables of On and CAFile: "KAFKA_" for KAFKA_TLS and KAFKA_CA_FILE
	On     bool
	CAFile string // PEM; the system's authorities without it
}

// Config returns what connections are made with, nil without TLS. It reads the file anew each time, so that an authority
// that was renewed is known by the next connection. Its error names the variable that is wrong.
func (t TLS) Config() (*tls.Config, error) {
	if !t.On {
		if t.CAFile != "" {
			return nil, fmt.Errorf("%[1]sTLS must be true when %[1]sCA_FILE is set", t.Prefix)
		}
		return nil, nil
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	if t.CAFile != "" {
		pem, err := os.ReadFile(t.CAFile)
		if err != nil {
			return nil, fmt.Errorf("%sCA_FILE can't be read: %w", t.Prefix, err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%sCA_FILE must be certificates in PEM, which %s is not", t.Prefix, t.CAFile)
		}
	}
	return config, nil
}

// Dial connects to HOST:PORT, within the timeout all in all.
func (t TLS) Dial(ctx context.Context, addr string, timeout time.Duration) (net.Conn, error) {
	config, err := t.Config()
	if err != nil {
		return nil, err
	}
	dialer := &net.Dialer{Timeout: timeout}
	if config == nil {
		return dialer.DialContext(ctx, "tcp", addr)
	}
	return (&tls.Dialer{NetDialer: dialer, Config: config}).DialContext(ctx, "tcp", addr)
}

// Advice says what to do about an error of a connection, or nothing if that is not known, and whether the error lasts:
// whether it will not pass until somebody changes something.
func (t TLS) Advice(err error) (advice string, lasting bool) {
	var notTLS tls.RecordHeaderError
	var unknown x509.UnknownAuthorityError
	var host x509.HostnameError
	var invalid x509.CertificateInvalidError
	closed := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.ECONNRESET)
	late := errors.Is(err, context.DeadlineExceeded) || errors.Is(err, os.ErrDeadlineExceeded)
	const noTLS = " no TLS at this port: unset $TLS or give its TLS port"
	switch {
	case errors.As(err, &notTLS):
		advice, lasting = "$PEER speaks"+noTLS, true
	case errors.As(err, &unknown):
		advice, lasting = "$CA_FILE must hold the authority that has signed $PEER's certificate", true
	case errors.As(err, &host):
		advice, lasting = "$PEER must be called by a name that its certificate holds", true
	case errors.As(err, &invalid):
		advice, lasting = "$PEER's certificate must be renewed or replaced", true
	case closed && t.On:
		advice = "$PEER closed the connection; if it always does, it may speak" + noTLS
	case closed:
		advice = "$PEER closed the connection; if it always does, it may want $TLS"
	case late && t.On:
		advice = "$PEER did not answer in time; if it never does, it may speak" + noTLS
	case late:
		advice = "$PEER did not answer in time"
	}
	return strings.NewReplacer("$PEER", t.Peer, "$", t.Prefix).Replace(advice), lasting
}

// Explain returns err with the advice on it.
func (t TLS) Explain(err error) error {
	if advice, _ := t.Advice(err); advice != "" {
		return fmt.Errorf("%w: %s", err, advice)
	}
	return err
}

// CheckAddr returns an error unless addr is HOST:PORT.
func CheckAddr(addr string) error {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return err
	}
	if host == "" || port == "" {
		return errors.New(addr + " lacks one of them")
	}
	return nil
}

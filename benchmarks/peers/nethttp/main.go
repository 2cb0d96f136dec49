// Go's net/http with the same constant answer as the bare ASGI application, on one core.
package main

import (
	"log"
	"net/http"
	"os"
)

var body = []byte(`{"alive":true,"uptime":12.345,"timestamp":"2026-01-06T12:00:00.000Z"}`)

func live(w http.ResponseWriter, _ *http.Request) {
	h := w.Header()
	h["Content-Type"] = []string{"application/json"}
	h["Cache-Control"] = []string{"no-store"}
	h["X-Correlation-Id"] = []string{"4bf92f3577b34da6a3ce929d0e0e4736"}
	w.Write(body)
}

func main() {
	http.HandleFunc("/health/live", live)
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Args[1], nil))
}

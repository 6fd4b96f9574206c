// The search runs in a worker. Browsers refuse workers to a page that was opened as a file; there, an iframe takes its place.
if (location.protocol === "file:") {
  class IFrameWorker extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      this.waiting = [];
      frame.addEventListener("load", () => {
        this.inside = frame.contentWindow;
        this.inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }));
        const script = this.inside.document.createElement("script");
        script.src = url;
        script.addEventListener("load", () => {
          const waiting = this.waiting;
          this.waiting = null;
          waiting.forEach(data => this.postMessage(data));
        });
        this.inside.document.body.append(script);
      }, { once: true });
      frame.srcdoc = "<!doctype html><title>search</title><body></body>";
      document.body.append(frame);
    }

    postMessage(data) {
      if (this.waiting) this.waiting.push(data);
      else this.inside.dispatchEvent(new MessageEvent("message", { data }));
    }

    terminate() {}
  }
  window.IFrameWorker = window.Worker = IFrameWorker;
}

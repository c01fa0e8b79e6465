// SPDX-License-Identifier: Apache-2.0
// Browsers start no Worker for a page that was opened from a folder. The search of the site runs in
// a hidden frame then: the same messages, in the page's own thread.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(address) {
      super();
      this.waiting = [];
      this.room = null;
      const source = new URL(address, location.href).href;
      const frame = document.createElement("iframe");
      frame.hidden = true;
      frame.addEventListener("load", () => this.enter(frame.contentWindow, source), { once: true });
      frame.srcdoc = "<!doctype html><body></body>";
      document.body.append(frame);
    }

    enter(room, source) {
      room.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const load = (address) =>
        new Promise((done, failed) => {
          const script = room.document.createElement("script");
          script.src = address;
          script.onload = done;
          script.onerror = failed;
          room.document.body.append(script);
        });
      room.importScripts = (...addresses) =>
        addresses.reduce((before, next) => before.then(() => load(next)), Promise.resolve());
      load(source).then(() => {
        this.room = room;
        this.waiting.splice(0).forEach((data) => this.postMessage(data));
      });
    }

    postMessage(data) {
      if (this.room === null) this.waiting.push(data);
      else setTimeout(() => this.room.dispatchEvent(new this.room.MessageEvent("message", { data })));
    }

    terminate() {}
  };
}

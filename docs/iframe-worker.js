// Search in a page opened from disk: browsers start no worker there, so its script runs in a hidden frame.
if (location.protocol === "file:") window.Worker = class extends EventTarget {
  constructor(url) {
    super();
    const frame = Object.assign(document.createElement("iframe"), { hidden: true });
    document.body.append(frame);
    this.inside = frame.contentWindow;
    this.ready = new Promise(resolve => frame.addEventListener("begun", resolve));
    window.addEventListener("message", ({ source, data }) => {
      if (source === this.inside) this.dispatchEvent(new MessageEvent("message", { data }));
    });
    this.inside.document.open();
    this.inside.document.write(`<script>
      postMessage = data => parent.postMessage(data, "*");
      importScripts = async (...urls) => { for (const src of urls) await new Promise(onload =>
        document.body.append(Object.assign(document.createElement("script"), { src, onload }))) };
    <\/script><body><script src="${url}" onload="frameElement.dispatchEvent(new Event('begun'))"><\/script>`);
    this.inside.document.close();
  }
  async postMessage(data) {
    await this.ready;
    this.inside.dispatchEvent(new MessageEvent("message", { data }));
  }
};

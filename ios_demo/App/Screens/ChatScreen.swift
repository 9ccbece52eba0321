import LordbaDemo
import LordbaKit
import SwiftUI

/// A conversation whose answers stream in; the adapter can be another one for each of them.
struct ChatScreen: View {
  @Environment(AppModel.self) private var app

  var body: some View {
    @Bindable var app = app
    NavigationStack {
      Group {
        if let chat = app.chat {
          Conversation(chat: chat)
        } else if app.isOpening {
          ProgressView("Loading the program")
        } else {
          ContentUnavailableView(
            "No model is open", systemImage: "bubble.left", description: Text("Choose one under Models."))
        }
      }
      .navigationBarTitleDisplayMode(.inline)
    }
    .problemAlert($app.problem)
  }
}

private struct Conversation: View {
  @Bindable var chat: ChatModel
  @State private var isInstalling = false

  var body: some View {
    VStack(spacing: 0) {
      ScrollView {
        LazyVStack(alignment: .leading, spacing: 12) {
          ForEach(chat.messages) { MessageView(message: $0) }
        }
        .padding()
      }
      .defaultScrollAnchor(.bottom)
      if let speed = chat.speed { SpeedView(speed: speed) }
      input
    }
    .navigationTitle(chat.bundle.manifest.base.name)
    .toolbar {
      ToolbarItem(placement: .topBarLeading) { adapterPicker }
      ToolbarItem(placement: .topBarTrailing) { menu }
    }
    .fileImporter(isPresented: $isInstalling, allowedContentTypes: [.folder]) { result in
      Task { await install(result) }
    }
    .problemAlert($chat.problem)
  }

  private var adapterPicker: some View {
    Picker("Adapter", selection: $chat.adapter) {
      Text("none").tag(String?.none)
      ForEach(chat.adapters, id: \.self) { Text($0).tag(String?.some($0)) }
    }
    .disabled(chat.isAnswering)
    .accessibilityIdentifier("adapter")
  }

  private var menu: some View {
    Menu("More", systemImage: "ellipsis.circle") {
      Toggle("Continue texts as they are", isOn: $chat.writesPlainText)
      Button("New conversation", systemImage: "square.and.pencil") { chat.reset() }
      Button("Install an adapter folder", systemImage: "plus") { isInstalling = true }
    }
  }

  private var input: some View {
    HStack {
      TextField("Message", text: $chat.draft, axis: .vertical)
        .textFieldStyle(.roundedBorder)
        .lineLimit(1...5)
        .onSubmit { chat.send() }
      if chat.isAnswering {
        Button("Stop", systemImage: "stop.circle.fill") { chat.stop() }.labelStyle(.iconOnly)
      } else {
        Button("Send", systemImage: "arrow.up.circle.fill") { chat.send() }
          .labelStyle(.iconOnly)
          .disabled(chat.draft.isEmpty)
      }
    }
    .font(.title3)
    .padding()
    .background(.bar)
  }

  private func install(_ result: Result<URL, any Error>) async {
    switch result {
    case .success(let folder):
      let isScoped = folder.startAccessingSecurityScopedResource()
      defer { if isScoped { folder.stopAccessingSecurityScopedResource() } }
      await chat.install(folder)
    case .failure(let error): chat.problem = error.localizedDescription
    }
  }
}

private struct MessageView: View {
  let message: ChatModel.Message

  var body: some View {
    let isUser = message.role == .user
    VStack(alignment: .leading, spacing: 4) {
      if !isUser { Text(message.adapter ?? "base").font(.caption).foregroundStyle(.secondary) }
      Text(message.text.isEmpty ? "…" : message.text).textSelection(.enabled)
    }
    .padding(10)
    .background(isUser ? Color.accentColor.opacity(0.2) : Color.secondary.opacity(0.12), in: .rect(cornerRadius: 12))
    .frame(maxWidth: .infinity, alignment: isUser ? .trailing : .leading)
  }
}

private struct SpeedView: View {
  let speed: ChatModel.Speed

  var body: some View {
    HStack {
      Text("prompt: \(speed.promptTokens) tokens, \(Int(speed.promptMilliseconds)) ms")
      if speed.cachedTokens > 0 { Text("(\(speed.cachedTokens) cached)") }
      Spacer()
      if let rate = speed.tokensPerSecond {
        Text("\(rate, format: .number.precision(.fractionLength(1))) tokens/s")
      }
    }
    .font(.caption.monospacedDigit())
    .foregroundStyle(.secondary)
    .padding(.horizontal)
  }
}

package ai.lordba.demo.app

import ai.lordba.demo.R
import ai.lordba.demo.core.Message
import ai.lordba.demo.core.PromptStyle
import ai.lordba.demo.core.Role
import androidx.compose.foundation.layout.Arrangement
import androidx.compose.foundation.layout.Column
import androidx.compose.foundation.layout.fillMaxSize
import androidx.compose.foundation.layout.fillMaxWidth
import androidx.compose.foundation.layout.imePadding
import androidx.compose.foundation.layout.padding
import androidx.compose.foundation.lazy.LazyColumn
import androidx.compose.foundation.lazy.items
import androidx.compose.foundation.lazy.rememberLazyListState
import androidx.compose.material3.Button
import androidx.compose.material3.Card
import androidx.compose.material3.FilterChip
import androidx.compose.material3.MaterialTheme
import androidx.compose.material3.OutlinedButton
import androidx.compose.material3.OutlinedTextField
import androidx.compose.material3.Text
import androidx.compose.material3.TextButton
import androidx.compose.runtime.Composable
import androidx.compose.runtime.LaunchedEffect
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.saveable.rememberSaveable
import androidx.compose.runtime.setValue
import androidx.compose.ui.Modifier
import androidx.compose.ui.res.stringResource
import androidx.compose.ui.unit.dp
import androidx.lifecycle.compose.collectAsStateWithLifecycle

/** A conversation; another adapter answers the next message without the base being loaded again. */
@Composable
fun ChatScreen(
    model: ChatViewModel,
    modifier: Modifier = Modifier,
) {
    val state by model.state.collectAsStateWithLifecycle()
    LaunchedEffect(Unit) { model.refresh() }
    Column(
        modifier = modifier.fillMaxSize().imePadding().padding(16.dp),
        verticalArrangement = Arrangement.spacedBy(8.dp),
    ) {
        if (!state.isReady) OpenFirst()
        AdapterChips(state.adapters, state.adapter, stringResource(R.string.no_adapter), true, model::pick)
        Styles(state, model)
        Messages(state.chat.messages, Modifier.weight(1f))
        state.speed?.tokensPerSecond?.let { speed ->
            val made = state.speed ?: return@let
            Text(
                stringResource(
                    R.string.speed,
                    numberText(speed),
                    made.prefillTokens,
                    numberText(made.prefillNanos / 1e6, 0),
                ),
                style = MaterialTheme.typography.bodySmall,
            )
        }
        ErrorText(state.error)
        Entry(state, model)
    }
}

@Composable
private fun Styles(
    state: ChatScreenState,
    model: ChatViewModel,
) {
    val labels = mapOf(PromptStyle.CONTINUE to R.string.style_continue, PromptStyle.CHATML to R.string.style_chat)
    ButtonRow {
        labels.forEach { (style, label) ->
            FilterChip(
                selected = state.chat.style == style,
                onClick = { model.style(style) },
                label = { Text(stringResource(label)) },
                enabled = !state.isAnswering,
            )
        }
        TextButton(onClick = model::clear, enabled = !state.isAnswering) { Text(stringResource(R.string.new_chat)) }
    }
}

@Composable
private fun Messages(
    messages: List<Message>,
    modifier: Modifier,
) {
    val list = rememberLazyListState()
    LaunchedEffect(messages.size, messages.lastOrNull()?.text?.length) {
        if (messages.isNotEmpty()) list.scrollToItem(messages.lastIndex)
    }
    LazyColumn(state = list, modifier = modifier.fillMaxWidth(), verticalArrangement = Arrangement.spacedBy(8.dp)) {
        items(messages) { message ->
            val inset =
                if (message.role ==
                    Role.USER
                ) {
                    Modifier.padding(start = 48.dp)
                } else {
                    Modifier.padding(end = 48.dp)
                }
            Card(modifier = inset.fillMaxWidth()) { Text(message.text, modifier = Modifier.padding(12.dp)) }
        }
    }
}

@Composable
private fun Entry(
    state: ChatScreenState,
    model: ChatViewModel,
) {
    var draft by rememberSaveable { mutableStateOf("") }
    OutlinedTextField(
        value = draft,
        onValueChange = { draft = it },
        label = { Text(stringResource(R.string.message)) },
        maxLines = 4,
        modifier = Modifier.fillMaxWidth(),
    )
    ButtonRow {
        Button(
            onClick = {
                model.send(draft)
                draft = ""
            },
            enabled = state.isReady && !state.isAnswering && draft.isNotBlank(),
        ) { Text(stringResource(R.string.send)) }
        OutlinedButton(onClick = model::stop, enabled = state.isAnswering) { Text(stringResource(R.string.stop)) }
    }
}
